"""Pages: bit-identical to no pages, within the budget, and gone when the optimizer is."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_ops.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, PagingError, optimizer_memory
from lora_ops.runtime import native
from tests.optim.conftest import EXTENT, Run, assert_equal, state_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bits", [32, 8])
def test_500_steps_at_a_tenth_of_the_states(adamw: Callable, bits: int, tmp_path: Path) -> None:
    """Clipping, accumulation, schedule, groups, missing gradients, parameters that join and freeze: the same bits."""
    extent = EXTENT if bits == 32 else 4096
    budget = max(state_bytes(bits) // 10, 2 * extent)
    plain = Run(adamw(state_bits=bits)).train(500, join_at=150, freeze_at=300)
    paged = Run(adamw(state_bits=bits, page_budget=budget, page_dir=tmp_path, extent_bytes=extent))
    paged.train(500, join_at=150, freeze_at=300)
    assert_equal(paged.tensors(), plain.tensors())
    stats = paged.optimizer.paging_stats()
    assert stats.peak <= stats.budget <= budget
    assert stats.extents * extent > 5 * budget
    assert stats.misses > 0
    assert stats.read > 0
    assert stats.written > 0


@pytest.mark.parametrize("budget", [1, 2, 5, 100])
@pytest.mark.parametrize("bits", [32, 8])
def test_every_budget_gives_the_same_bits(adamw: Callable, bits: int, budget: int) -> None:
    plain = Run(adamw(state_bits=bits)).train(6)
    paged = Run(adamw(state_bits=bits, page_budget=(budget + 1) * 4096, extent_bytes=4096)).train(6)
    assert_equal(paged.tensors(), plain.tensors())


def test_parameters_without_elements(adamw: Callable, tmp_path: Path) -> None:
    """Have a state as without pages: in a state dict, and in a checkpoint, either way."""
    optimizers = []
    for pages in ({}, {"page_budget": 4 * 4096, "extent_bytes": 4096}):
        params = [nn.Parameter(torch.arange(5000.0)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizers.append(adamw(**pages)([{"params": params}]))
        optimizers[-1].step()
    for one, other in (optimizers, optimizers[::-1]):
        states = [o.state_dict()["state"] for o in (one, other)]
        for i, state in states[0].items():
            assert_equal(state, states[1][i])
            assert state["exp_avg"].shape == one.param_groups[0]["params"][i].shape
        other.load_state_dict(one.state_dict())
        other.step()
        other.save_checkpoint(tmp_path / "x", params=True)
        one.load_checkpoint(tmp_path / "x")


def test_bf16_with_stochastic_rounding_does_not_depend_on_pages(adamw: Callable) -> None:
    options = {"state_bits": 8, "stochastic_rounding": True, "seed": 3}
    plain = Run(adamw(**options), torch.bfloat16).train(20)
    paged = Run(adamw(**options, page_budget=4 * 4096, extent_bytes=4096), torch.bfloat16).train(20)
    assert_equal(paged.tensors(), plain.tensors())


def test_everything_resident_moves_nothing(adamw: Callable) -> None:
    run = Run(adamw(page_budget="64MiB")).train(5)
    stats = run.optimizer.paging_stats()
    assert (stats.read, stats.written, stats.bytes_by_tier["file"]) == (0, 0, 0)
    assert stats.hit_rate > 0.7


@pytest.mark.parametrize(
    ("budget", "extent"),
    [("128KiB", 64 << 10), ("1MiB", 128 << 10), ("64MiB", 8 << 20), ("128MiB", 16 << 20), ("9GB", 16 << 20)],
)
def test_extents_are_an_eighth_of_the_budget(budget: str, extent: int) -> None:
    """From 64 KiB to 16 MiB, on the CPU to 512 KiB, and a power of two."""
    assert optimizer_memory([10], page_budget=budget, device="cuda").extent_bytes == extent
    assert optimizer_memory([10], page_budget=budget).extent_bytes == min(extent, 512 << 10)


def test_misses_are_the_least_possible(adamw: Callable) -> None:
    """A step touches every extent once: with F frames all but F must be fetched. LRU would fetch all.

    Frames of parameters that have no gradient any more are the first to go.
    """
    params = [nn.Parameter(torch.randn(2048)) for _ in range(12)]  # an extent each
    optimizer = adamw(page_budget=5 * EXTENT, extent_bytes=EXTENT)([{"params": params}])
    before = optimizer.paging_stats()
    trained = params
    for step in range(12):
        if step == 6:
            in_frames = [e for e, page in enumerate(optimizer._store.pager.table) if page.frame is not None]
            trained = [p for e, p in enumerate(params) if e not in in_frames[:4]]
        for p in params:
            p.grad = torch.randn_like(p) if any(p is q for q in trained) else None
        optimizer.step()
        after = optimizer.paging_stats()
        if step not in (0, 6):
            assert (after.hits - before.hits, after.misses - before.misses) == (5, len(trained) - 5)
            assert after.read - before.read == (len(trained) - 5) * EXTENT
        before = after
    # As many as were fetched, but for the frames that were free in the first step; the last ones may be under way.
    assert 0 < before.written <= (before.misses - 5) * EXTENT
    assert before.waited > 0


def test_memory_and_files_return(tmp_path: Path) -> None:
    p = nn.Parameter(torch.randn(1 << 16))
    optimizer = AdamW([p], page_budget=2 * EXTENT, extent_bytes=EXTENT, page_dir=tmp_path / "pages")
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert (tmp_path / "pages" / "lora_ops.pages").stat().st_size == 512 << 10
    state = optimizer.state_dict()  # outlives the optimizer
    assert sorted(f.name for f in (tmp_path / "pages").iterdir()) == ["lora_ops.lock", "lora_ops.pages"]
    descriptors = len(os.listdir("/proc/self/fd"))
    del optimizer
    gc.collect()
    assert list((tmp_path / "pages").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2
    assert bool((state["state"][0]["exp_avg_sq"] > 0).all())
    again = AdamW([p], page_budget=2 * EXTENT, extent_bytes=EXTENT, page_dir=tmp_path / "pages")
    again.close()


KILLED = """
import os, signal, sys, tempfile, torch
from lora_ops.optim import AdamW
p = torch.nn.Parameter(torch.ones(1 << 16))
p.grad = torch.ones(1 << 16)
optimizer = AdamW([p], page_budget=1 << 15, extent_bytes=1 << 14)
for _ in range(4):
    optimizer.step()
assert optimizer.paging_stats().written > 0
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_temporary_stays_of_a_killed_process(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    with pytest.raises(PagingError, match=r"page_dir: cannot create /proc/self/lora_ops\.pages \(temporary\): "):
        AdamW([nn.Parameter(torch.ones(3))], page_budget="1MiB")


FIRST = """
import gc, weakref, torch
from lora_ops.optim import AdamW
gc.collect()
gc.disable()
def make():
    p = torch.nn.Parameter(torch.ones(1 << 14))
    p.grad = torch.ones(1 << 14)
    optimizer = AdamW([p], page_budget=1 << 15, extent_bytes=1 << 14)
    for _ in range(3):
        optimizer.step()
    return weakref.ref(optimizer)
assert make()() is None, "it lives on"
"""


def test_the_first_optimizer_goes_without_a_garbage_collection() -> None:
    """In a process of its own: torch imports its compiler in the first one."""
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_bitsandbytes() -> None:
    p = nn.Parameter(torch.randn(5000))
    for cls, bits, paged in ((AdamW8bit, 8, False), (PagedAdamW, 32, True), (PagedAdamW8bit, 8, True)):
        optimizer = cls([p], lr=1e-3)
        assert optimizer.param_groups[0]["state_bits"] == bits
        assert (optimizer.page_budget is not None) == paged
        optimizer.close()


def test_stats_in_words(adamw: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_ops"):
        run = Run(adamw(page_budget=4 * EXTENT, extent_bytes=EXTENT)).train(3)
    assert "hit rate" in str(run.optimizer.paging_stats())
    assert any("paged optimizer states" in r.message for r in caplog.records)
    with pytest.raises(ValueError, match="paging_stats: the optimizer has no page_budget"):
        AdamW([nn.Parameter(torch.ones(3))]).paging_stats()


@pytest.mark.parametrize("bits", [32, 8])
def test_planner_agrees_with_the_optimizer(adamw: Callable, bits: int) -> None:
    run = Run(adamw(state_bits=bits, page_budget=4 * EXTENT, extent_bytes=EXTENT)).train(3)
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    plan = optimizer_memory(params, state_bits=bits, page_budget=4 * EXTENT, extent_bytes=EXTENT)
    stats = run.optimizer.paging_stats()
    assert (plan.extents, plan.fast) == (stats.extents, stats.peak)
    assert plan.slow == stats.bytes_by_tier["file"]
    unpaged = optimizer_memory([10**6], state_bits=bits)
    assert unpaged.fast == unpaged.states
    assert unpaged.states == pytest.approx({32: 8e6, 8: 2e6 * (1 + 4 / 256)}[bits], rel=1e-3)


RSS = """
import re, sys, torch
from lora_ops.optim import AdamW
budget, bits, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
# Not ru_maxrss, which a child inherits from its parent: of a large pytest process nothing would ever grow.
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def run(n, **kwargs):
    p = torch.nn.Parameter(torch.randn(n))
    p.grad = torch.randn(n)
    optimizer = AdamW([p], state_bits=bits, **kwargs)
    before = peak()
    for _ in range(3):
        optimizer.step()
    optimizer.save_checkpoint(folder + "/x")
    optimizer.load_checkpoint(folder + "/x")
    return peak() - before
run(1 << 12)  # what is loaded once
print(run(1 << 24, page_budget=budget, page_dir=folder + "/pages") if budget else run(1 << 24))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM of /proc/self/status: run on Linux")
@pytest.mark.skipif(
    not native.available(), reason=f"the reference needs temporaries beside the pages: {native.BUILD_HINT}"
)
@pytest.mark.parametrize(("bits", "states"), [(32, 128 << 20), (8, (32 << 20) * 65 // 64)])
def test_resident_memory_keeps_the_budget(bits: int, states: int, tmp_path: Path) -> None:
    """Peak resident set of a process, steps, save and load included: the budget and a few buffers."""

    def grew(budget: int) -> int:
        command = [sys.executable, "-c", RSS, str(budget), str(bits), str(tmp_path)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    assert grew(8 << 20) < (8 << 20) + (6 << 20)
    if bits == 32:  # what the measurement sees without pages
        assert grew(0) > 0.9 * states


@pytest.mark.parametrize(
    ("params", "kwargs", "message"),
    [
        ([5000], {"state_bits": 16}, "state_bits: expected 32 or 8, got 16"),
        ([5000], {"device": "mps"}, "device: expected one of cpu, cuda, got 'mps'"),
        ([-1], {}, "params: expected tensors or numbers of elements, got -1"),
        (["x"], {}, "params: expected tensors or numbers of elements, got 'x'"),
        (torch.ones(3), {}, "params: expected several tensors or numbers of elements, got one tensor"),
    ],
)
def test_errors_of_the_planner(params: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer_memory(params, **kwargs)
    assert optimizer_memory([5000], device="cuda:0") == optimizer_memory(
        [torch.empty(5000)], device=torch.device("cuda")
    )
