"""A small model and a training run with everything that an optimizer meets in real use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ops.optim import AdamW

EXTENT = 16 << 10  # small, so that a small model has many


class Model(nn.Module):
    """Embedding, two ragged linear layers with biases, an expert that gets a gradient in some steps only, a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 65)
        self.up = nn.Linear(65, 201)
        self.expert = nn.Linear(201, 67)
        self.down = nn.Linear(201, 67)
        self.head = nn.Linear(67, 100)
        self.to(dtype)

    def forward(self, tokens: Tensor, use_expert: bool) -> Tensor:
        h = torch.tanh(self.up(self.embed(tokens)))
        h = self.expert(h) if use_expert else self.down(h)
        return self.head(torch.tanh(h))


@dataclass
class Run:
    """A training run that can be continued; everything random in it depends on the step alone."""

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    late: nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.model = Model(self.dtype)
        self.late = nn.Linear(100, 67).to(self.dtype)  # joins the optimizer half-way
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = self.make([{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (1 + s / 100))
        self.steps = 0

    def train(self, until: int, *, join_at: int = -1, freeze_at: int = -1) -> Run:
        while self.steps < until:
            if self.steps == join_at:
                self.join()
            if self.steps == freeze_at:
                self.model.up.weight.requires_grad_(False)
            g = torch.Generator().manual_seed(self.steps)
            for _ in range(2):  # accumulation
                tokens = torch.randint(0, 100, (8,), generator=g)
                out = self.model(tokens, use_expert=self.steps % 3 == 0)
                if self.joined:
                    out = self.late(out)[:, :67] @ self.model.head.weight.T
                loss = nn.functional.cross_entropy(out.float(), (tokens * 7 + 1) % 100)
                loss.backward()
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, 0.5)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.steps += 1
        return self

    @property
    def joined(self) -> bool:
        return len(self.optimizer.param_groups) == 3

    def join(self) -> None:
        self.optimizer.add_param_group({"params": list(self.late.parameters()), "initial_lr": 1e-2, "lr": 1e-2})
        self.schedule.base_lrs.append(1e-2)
        self.schedule.lr_lambdas.append(self.schedule.lr_lambdas[0])

    def tensors(self) -> dict[str, Tensor]:
        """Copies of parameters and states, by name."""
        found = {
            f"param.{n}": p.detach().clone() for n, p in [*self.model.named_parameters(), ("late", self.late.weight)]
        }
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{i}.{name}": t.clone() for name, t in state.items()}
        return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def state_bytes(bits: int) -> int:
    model = Model()
    return sum(p.numel() * 8 if bits == 32 or p.numel() < 4096 else p.numel() * 2 for p in model.parameters())


@pytest.fixture
def adamw() -> Iterator[Callable[..., Callable[[list[dict[str, Any]]], AdamW]]]:
    """`adamw(**kwargs)` makes a maker of optimizers, which are closed after the test."""
    made: list[AdamW] = []

    def with_(**kwargs: Any) -> Callable[[list[dict[str, Any]]], AdamW]:
        def make(groups: list[dict[str, Any]]) -> AdamW:
            made.append(AdamW(groups, lr=1e-2, weight_decay=0.1, **kwargs))
            return made[-1]

        return make

    yield with_
    for optimizer in made:
        optimizer.close()
    made.clear()
    gc.collect()
