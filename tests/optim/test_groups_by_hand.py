"""States belong to parameters, not to places: groups and `state` that are changed by hand, as torch allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ops.optim import AdamW

STORES: dict[str, dict[str, Any]] = {
    "no pages": {},
    "pages": {"page_budget": 16 << 10, "extent_bytes": 8 << 10},
    "8 bits": {"state_bits": 8},
    "8 bits, pages": {"state_bits": 8, "page_budget": 16 << 10, "extent_bytes": 8 << 10},
}
N = 5000  # three extents in 32 bits


def param(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(seed)))


class Trained:
    """Three parameters in groups of their own, after some steps; each gets gradients of its own."""

    def __init__(self, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
        self.params = [param(i) for i in range(3)]
        self.optimizer = make([{"params": [p]} for p in self.params])
        self.steps = 0
        self.train(4)

    def train(self, n: int) -> None:
        for _ in range(n):
            for i, p in enumerate(self.params):
                p.grad = torch.randn(N, generator=torch.Generator().manual_seed(100 * self.steps + i))
            self.optimizer.step()
            self.steps += 1


def take_out(run: Trained) -> None:
    run.optimizer.param_groups.pop(0)


def reorder(run: Trained) -> None:
    run.optimizer.param_groups.reverse()


def replace(run: Trained) -> None:
    run.params[1] = param(9)
    run.optimizer.param_groups[1]["params"] = [run.params[1]]


def delete_one(run: Trained) -> None:
    del run.optimizer.state[run.params[2]]


def delete_all(run: Trained) -> None:
    run.optimizer.state = defaultdict(dict)


CHANGES = (take_out, reorder, replace, delete_one, delete_all)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("change", CHANGES)
def test_states_follow(change: Callable[[Trained], None], store: dict[str, Any]) -> None:
    ours = Trained(lambda groups: AdamW(groups, lr=1e-2, **store))
    like = Trained(
        lambda groups: (
            AdamW(groups, lr=1e-2, state_bits=8) if "state_bits" in store else torch.optim.AdamW(groups, lr=1e-2)
        )
    )
    for run in (ours, like):
        change(run)
        run.train(3)
    if "state_bits" not in store:
        for a, b in zip(ours.params, like.params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        return
    expected = eight_bits(change)
    for a, b in zip(ours.params, expected, strict=True):
        assert torch.equal(a, b)


def eight_bits(change: Callable[[Trained], None]) -> list[Tensor]:
    """The same with an optimizer for each parameter, which has no place to mistake."""
    params = [param(i) for i in range(3)]
    optimizers = [AdamW([p], lr=1e-2, state_bits=8) for p in params]
    for step in range(7):
        if step == 4 and change is replace:
            params[1] = param(9)
        if step == 4 and change in (replace, delete_one, delete_all):
            fresh = {replace: [1], delete_one: [2], delete_all: [0, 1, 2]}[change]
            for i in fresh:
                optimizers[i] = AdamW([params[i]], lr=1e-2, state_bits=8)
        for i, (p, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            if not (change is take_out and step >= 4 and i == 0):
                p.grad = torch.randn(N, generator=torch.Generator().manual_seed(100 * step + i))
                optimizer.step()
    return params


def saved(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The states in the order of the parameters."""
    state = optimizer.state_dict()["state"]
    return [state.get(i, {}) for i in range(sum(len(group["params"]) for group in optimizer.param_groups))]


@pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", [False, True], ids=["state dict", "checkpoint"])
def test_what_is_saved_follows(
    file: bool, change: Callable[[Trained], None], store: dict[str, Any], tmp_path: Path
) -> None:
    """Also before the next step has seen the change."""
    run = Trained(lambda groups: AdamW(groups, lr=1e-2, **store))
    states = {p: {k: t.clone() for k, t in s.items()} for p, s in zip(run.params, saved(run.optimizer), strict=True)}
    change(run)
    if file:
        run.optimizer.save_checkpoint(tmp_path / "x")
    else:
        state = run.optimizer.state_dict()
    fresh = {replace: {1}, delete_one: {2}, delete_all: {0, 1, 2}}.get(change, set())
    kept = [p for group in run.optimizer.param_groups for p in group["params"]]
    begun = [run.params[i] for i in fresh]
    expected = [{} if any(p is q for q in begun) else states[p] for p in kept]
    again = AdamW([{"params": [p]} for p in kept], lr=1e-2, **store)
    if file:
        again.load_checkpoint(tmp_path / "x")
    else:
        again.load_state_dict(state)
    for optimizer in (run.optimizer, again):
        for got, want in zip(saved(optimizer), expected, strict=True):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("bits", [32, 8])
def test_room_of_forgotten_states_is_used_again(bits: int) -> None:
    run = Trained(lambda groups: AdamW(groups, lr=1e-2, **STORES["pages"], state_bits=bits))
    assert isinstance(run.optimizer, AdamW)
    before = run.optimizer.paging_stats().extents
    for change in (replace, delete_one, delete_all, reorder):
        change(run)
        run.train(2)
    assert run.optimizer.paging_stats().extents == before
