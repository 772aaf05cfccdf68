"""The GPU suite's section about pages: what it calls wrong, and that what it compares with does the work."""

from __future__ import annotations

import pytest
import torch

from bench.device import paging
from lora_ops.optim import AdamW

STEPS = [("paged step", 0.0, 10.0), ("paged step", 20.0, 30.0)]
COPY = ("cudaMemcpyAsync", 1.0, 2.0)


@pytest.mark.parametrize(
    "call", ["cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"]
)
def test_a_call_that_blocks_the_host_is_wrong_within_a_step(call: str) -> None:
    assert paging.judge_calls([*STEPS, COPY, (call, 25.0, 26.0)], "cuda") == ("wrong", f"the host waits in {call}")
    assert paging.judge_calls([*STEPS, COPY, (call, 15.0, 16.0)], "cuda") == ("ok", "")


def test_a_profile_without_runtime_calls_proves_nothing() -> None:
    assert paging.judge_calls(STEPS, "cuda")[0] == "declined"
    assert paging.judge_calls([*STEPS, COPY], "cuda") == ("ok", "")


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_that_is_missing_or_on_stale_states_shows(bits: int) -> None:
    work = paging.Workload("cpu", paging.DRY, bits)
    params = work.params()
    optimizer = AdamW(params, **work.options)
    for _ in range(paging.STEPS - 1):
        optimizer.step()
    assert "differ from those without pages" in str(work.differs(params))
    assert work.is_off(params)
    optimizer.step()
    assert work.differs(params) is None
    assert work.is_off(params) is None


def test_copies_move_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, s, **kw: (moved.append(t.nbytes), copy_(t, s, **kw))[1])
    paging.copies(paging.Workload("cpu", paging.DRY, 32), 20 * 4096, 12 * 4096, 4096)()
    assert sum(moved) == 32 * 4096
