"""What a captured graph could get wrong is found: results of another input, results not written, waits for the GPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from bench.clocks import CpuClock
from bench.device import graphs, sections
from bench.device.checks import CHECKS
from bench.device.discover import registered_ops
from bench.device.graphs import CAPTURES, SYNCHRONIZES, Captured, Recording, record_calls, wrong_capture
from bench.measure import Run


def _case(factor: torch.Tensor | None = None) -> Captured:
    x, factor = torch.arange(4.0), torch.tensor(3.0) if factor is None else factor
    return Captured({"x": x, "factor": factor}, {"x": x + 1, "factor": factor + 2}, lambda: {"y": x * factor})


def test_every_checked_op_is_captured_or_says_why_not() -> None:
    names = {op.name for op in registered_ops()}
    assert set(CAPTURES) | set(SYNCHRONIZES) <= names
    assert set(CHECKS) <= set(CAPTURES) | set(SYNCHRONIZES)
    assert not set(CAPTURES) & set(SYNCHRONIZES)


def test_calls_on_changed_operands_pass() -> None:
    assert wrong_capture(_case(), record_calls) is None


def test_a_value_kept_from_the_capture_is_found() -> None:
    case = _case()

    def record(call: Any) -> Recording:
        kept, results = case.operands["factor"].item(), call()
        return Recording(results, lambda: results["y"].copy_(case.operands["x"] * kept))

    assert wrong_capture(case, record) == "replay 1 differs from eager in y"


def test_results_that_a_replay_leaves_are_found() -> None:
    assert wrong_capture(_case(), lambda call: Recording(call(), lambda: None)) == "replay 1 differs from eager in y"


def test_elements_that_a_replay_leaves_are_found() -> None:
    """Even where what stands there from the capture happens to be right."""
    x = torch.arange(4.0)
    case = Captured({"x": x}, {"x": torch.tensor([5.0, 1, 2, 3])}, lambda: {"y": x * 2})

    def record(call: Any) -> Recording:
        results = call()
        return Recording(results, lambda: results["y"][:1].copy_(x[:1] * 2))

    assert wrong_capture(case, record) == "replay 1 differs from eager in y"


def test_operands_without_effect_are_found() -> None:
    case = _case(torch.zeros(()))
    case.others["factor"].zero_()
    assert "proves nothing" in (wrong_capture(case, record_calls) or "")


def test_a_wait_for_the_gpu_is_a_wrong_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(call: Any) -> Recording:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record_calls", record)
    run = Run("test")
    for _ in sections.SECTIONS["capture dequantize_nf4"](
        sections.Context(sections.DRY_PLAN, CpuClock(), run, dry=True)
    ):
        pass
    assert run.bad
    assert {check["status"] for check in run.checks} == {"wrong"}
    assert all("stream is capturing" in check["reason"] and check["captured"] for check in run.checks)


def test_recording_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of its steps, on stand-ins for CUDA: warmed up on a side stream, captured once, replayed as a graph."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def capture(graph: Graph) -> Any:
        log.append("capture")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    def call() -> dict[str, torch.Tensor]:
        log.append("call")
        return {"y": torch.ones(1)}

    recording = graphs.record_graph(call)
    recording.replay()
    warm = ["side waits for main", "on side", "call", "call", "call", "main waits for side"]
    assert log == [*warm, "capture", "call", "captured", "replay"]
