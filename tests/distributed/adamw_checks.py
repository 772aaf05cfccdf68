"""AdamW over sharded parameters: what each rank checks. Run by test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lora_ops.optim import AdamW, optimizer_memory

# Uneven in two and in three parts; of whole blocks in each part and not; fewer rows than ranks; strided columns.
SHARDED = ((8, 1024), (7, 1024), (7, 900), (5, 820), (50, 100), (1, 5000), (300,), (2,))
KINDS: dict[str, dict[str, Any]] = {
    "32 bits": {},
    "8 bits": {"state_bits": 8},
    "8 bits, pages": {"state_bits": 8, "page_budget": "128KiB"},
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def draw(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in (*SHARDED, (64, 64), (60, 90), (64, 128))]


class Trained:
    """Sharded parameters, one sharded by columns, one replicated, and a plain one, in two groups; or all plain."""

    def __init__(self, sharded: bool, **kwargs: Any) -> None:
        ranks = mesh() if sharded else None
        placements = [*([Shard(0)] * len(SHARDED)), Shard(1), Replicate(), None]

        def laid_out(t: Tensor, placement: Any) -> Tensor:
            return t if ranks is None or placement is None else distribute_tensor(t, ranks, [placement])

        self.lay_out = lambda tensors: [laid_out(t, p) for t, p in zip(tensors, placements, strict=True)]
        self.params = [nn.Parameter(t) for t in self.lay_out(draw(0))]
        self.optimizer = AdamW(
            [{"params": self.params[:3], "weight_decay": 0.3}, {"params": self.params[3:], "lr": 0.02}],
            lr=0.01, **kwargs,
        )  # fmt: skip
        self.steps = 0

    def train(self, n: int) -> Trained:
        for _ in range(n):
            self.steps += 1
            for p, grad in zip(self.params, self.lay_out(draw(self.steps)), strict=True):
                p.grad = grad
            self.optimizer.step()
        return self

    def values(self) -> list[Tensor]:
        return [whole(p) for p in self.params]

    def states(self) -> dict[int, dict[str, Tensor]]:
        return self.optimizer.state_dict()["state"]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def gathered(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {i: {k: whole(t) for k, t in entry.items()} for i, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own: a state dict's are those of the optimizer."""
    state = {i: {k: t.clone() for k, t in entry.items()} for i, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


def check_steps_equal_the_unsharded_ones(folder: Path) -> None:
    """Bit for bit in 32 bits, and in 8 where parts begin at whole blocks; elsewhere codes differ."""
    for name, kwargs in KINDS.items():
        ours, plain = Trained(True, **kwargs).train(4), Trained(False, **kwargs).train(4)
        states = ours.states()
        aligned = [len(s.get("exp_avg_absmax", torch.empty(0)).shape) == 1 for s in states.values()]
        assert "8" not in name or {True, False} == set(aligned)
        for i, (a, b) in enumerate(zip(ours.values(), plain.values(), strict=True)):
            if aligned[i]:
                assert torch.equal(a, b), (name, i)
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.01)  # of a path of up to 0.08
        for i, state in plain.states().items():
            for key, t in state.items():
                got = whole(states[i][key])
                assert got.dtype == t.dtype
                assert not aligned[i] or torch.equal(got, t), (name, i, key)
        for run in (ours, plain):
            run.optimizer.close()


def check_a_part_is_stepped_as_a_plain_tensor(folder: Path) -> None:
    """With blocks that begin anew in each part: those of an optimizer over the part alone."""
    start, ranks = torch.randn(50, 1111), mesh()
    p = nn.Parameter(distribute_tensor(start, ranks, [Shard(0)]))
    q = nn.Parameter(p.to_local().detach().clone())
    assert q.numel() >= 4096
    ours, plain = AdamW([p], lr=0.1, state_bits=8), AdamW([q], lr=0.1, state_bits=8)
    for i in range(4):
        grad = distribute_tensor(
            torch.randn(start.shape, generator=torch.Generator().manual_seed(i)), ranks, [Shard(0)]
        )
        p.grad, q.grad = grad, grad.to_local().clone()
        ours.step()
        plain.step()
    assert torch.equal(p.to_local(), q)


def check_state_dicts_round_trip(folder: Path) -> None:
    """As they are, and whole; whole ones of a plain optimizer too, where its blocks are ours."""
    for kwargs in KINDS.values():
        first = Trained(True, **kwargs).train(3)
        sharded = copied(first.optimizer.state_dict())
        full = gathered(sharded)
        values = [t.detach().clone() for t in first.params]
        expected = first.train(2).values()
        for state in (sharded, full):
            again = Trained(True, **kwargs)
            again.steps = 3
            with torch.no_grad():
                for p, value in zip(again.params, values, strict=True):
                    p.copy_(value)
            again.optimizer.load_state_dict(state)
            assert all(map(torch.equal, again.train(2).values(), expected))
            again.optimizer.close()
        first.optimizer.close()
    for bits in (32, 8):
        plain = Trained(False, state_bits=bits).train(3)
        state = plain.optimizer.state_dict()
        ours = Trained(True, state_bits=bits)
        rows = [i for i, s in ours.train(3).states().items() if len(s.get("exp_avg_absmax", torch.empty(0)).shape) > 1]
        if rows:
            with pytest.raises(ValueError, match=r"exp_avg_absmax: expected shape .*load on as many ranks as they"):
                ours.optimizer.load_state_dict(state)
            continue
        ours.optimizer.load_state_dict(state)
        for a, b in zip(ours.train(2).values(), plain.train(2).values(), strict=True):
            assert torch.equal(a, b)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 70), nn.Tanh(), nn.Linear(70, 1))


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)
    for i in steps:
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(i))
        loss = m(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def adamw(m: nn.Module, bits: int) -> AdamW:
    # torch broadcasts those values of groups that the target has as well: a schedule's initial_lr is to be there.
    return AdamW([{"params": list(m.parameters()), "initial_lr": 1e-2}], lr=1e-2, state_bits=bits)


def check_torchs_functions_for_state_dicts(folder: Path) -> None:
    """FSDP2, get and set in every way that torch offers; DCP writes to and reads from a folder."""
    ways: dict[str, StateDictOptions] = {
        "sharded": StateDictOptions(),
        "offloaded": StateDictOptions(cpu_offload=True),
        "full": StateDictOptions(full_state_dict=True),
        "broadcast": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    }
    for bits in (32, 8):
        first = fully_shard(model(), mesh=mesh())
        one = adamw(first, bits)
        train(first, one, range(3))
        weights = {k: v.clone() for k, v in first.state_dict().items()}
        saved = {way: copied(get_optimizer_state_dict(first, one, options=o)) for way, o in ways.items()}
        dcp.save({"optimizer": get_optimizer_state_dict(first, one)}, checkpoint_id=str(folder / f"dcp{bits}"))
        expected = train(first, one, range(3, 6))
        for way in (*ways, "DCP"):
            second = fully_shard(model(), mesh=mesh())
            second.load_state_dict(weights)
            two = adamw(second, bits)
            if way == "DCP":
                state = {"optimizer": get_optimizer_state_dict(second, two)}
                dcp.load(state, checkpoint_id=str(folder / f"dcp{bits}"))
                set_optimizer_state_dict(second, two, state["optimizer"])
            else:
                state = saved[way] if way != "broadcast" or dist.get_rank() == 0 else {}
                set_optimizer_state_dict(second, two, state, options=ways[way])
            assert train(second, two, range(3, 6)) == expected, (bits, way)


def check_random_bits(folder: Path) -> None:
    """Stochastic rounding: other bits in each part, the same ones in copies."""
    for placement, same in ((Shard(0), False), (Replicate(), True)):
        ranks = dist.get_world_size() if not same else 1
        p = nn.Parameter(distribute_tensor(torch.ones(ranks, 3000).bfloat16(), mesh(), [placement]))
        p.grad = torch.ones_like(p)
        AdamW([p], lr=1e-3, stochastic_rounding=True).step()
        parts = [torch.empty(1, 3000, dtype=torch.bfloat16) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.to_local().detach())
        assert torch.equal(parts[0], parts[1]) == same
        assert len(parts[0].unique()) == 2


def check_what_is_said(folder: Path) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(8, 512), mesh(), [Shard(0)]))
    optimizer = AdamW([p], state_bits=8)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"save_checkpoint: expected plain parameters, .* torch.distributed.checkpoint"
    ):
        optimizer.save_checkpoint(folder / "x")
    with pytest.raises(ValueError, match=r"load_checkpoint: expected plain parameters"):
        optimizer.load_checkpoint(folder / "x")
    plain = AdamW([nn.Parameter(torch.ones(8, 512))], state_bits=8)
    with pytest.raises(ValueError, match=r"parameter 0: expected a plain tensor .* got a DTensor: take the state dict"):
        plain.load_state_dict(optimizer.state_dict())
    here = p.to_local().numel()
    assert optimizer_memory([p]).states == 8 * here
    assert 2 * here < optimizer_memory([p], state_bits=8).states < 8 * here  # the bits go by the whole
