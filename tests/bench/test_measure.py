"""A wrong result is never timed, and one contender's failure stops nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings
from bench.clocks import CpuClock, CudaClock, StepClock
from bench.files import write_json, write_with
from bench.measure import Comparison, Contender, Run, Unavailable, measure
from bench.plan import Effort, Plan
from bench.suites import SUITES, nf4_linear

CEILINGS = Ceilings(1e9, 1e9, 1e9)
EFFORT = Effort(min_rounds=3, max_rounds=3, seconds=0.0, warmup=1)


def _missing() -> Contender:
    raise Unavailable("not installed")


def _broken() -> Contender:
    raise RuntimeError("no such kernel\nmore")


def test_statuses_order_and_interleaving() -> None:
    calls: list[str] = []

    def contender(name: str, wrong: str | None = None) -> Contender:
        return Contender(lambda: calls.append(name), lambda: wrong, bytes=1000)

    makers = {
        "lora_ops": lambda: contender("lora_ops"),
        "lora_ops bad": lambda: contender("bad", "off by one"),
        "dense": lambda: contender("dense"),
        "missing": _missing,
        "broken": _broken,
    }
    rows = measure(Comparison("op", "", 1, 2, 3, 1e3, "dense", makers), CpuClock(), CEILINGS, EFFORT)
    assert [row.contender for row in rows] == list(makers)
    assert [row.status for row in rows] == ["ok", "wrong", "ok", "unavailable", "failed"]
    assert [row.bad for row in rows] == [False, True, False, False, False]
    assert rows[4].reason == "RuntimeError: no such kernel"
    assert calls == ["lora_ops", "dense"] * 4
    assert "bad" not in calls
    assert rows[1].median_ms is None
    assert rows[2].over_baseline == 1.0
    assert Run("r", rows=rows).bad


def test_the_baseline_may_be_the_slowest_of_several() -> None:
    """Where one of them has no time, there are no ratios."""

    class Fixed(CpuClock):
        def interleave(self, runs: Any, effort: Effort) -> dict[str, list[float]]:
            return {name: [{"lora_ops": 6.0, "a": 3.0, "b": 5.0}[name]] for name in runs}

    def makes(wrong: str | None) -> Any:
        return lambda: Contender(int, lambda: wrong, 1)

    for b, ratios in ((None, [1.2, 0.6, 1.0]), ("wrong", [None, None, None])):
        makers = {"lora_ops": makes(None), "a": makes(None), "b": makes(b)}
        comparison = Comparison("op", "", 1, 2, 3, 0.0, "the slower", makers, slowest_of=("a", "b"))
        assert [row.over_baseline for row in measure(comparison, Fixed(), CEILINGS, EFFORT)] == ratios


def test_a_wrong_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nf4_linear.nf4_linear
    monkeypatch.setattr(nf4_linear, "nf4_linear", lambda *args: right(*args) * 1.02)
    plan = Plan(shapes=((64, 128),), tokens=(16,), effort=EFFORT)
    (comparison,) = SUITES["nf4_linear"](plan)
    rows = {row.contender: row for row in measure(comparison, CpuClock(), CEILINGS, EFFORT)}
    assert rows["lora_ops"].status == "wrong"
    assert rows["lora_ops"].median_ms is None
    assert "RMS error" in rows["lora_ops"].reason
    assert rows["dense"].status == "ok"


def test_a_backend_that_cannot_serve_is_unavailable() -> None:
    plan = Plan(shapes=((64, 128),), tokens=(2,), backends=("auto", "cuda"), effort=EFFORT)
    (comparison,) = SUITES["nf4_linear"](plan)
    rows = {row.contender: row for row in measure(comparison, CpuClock(), CEILINGS, EFFORT)}
    assert rows["lora_ops"].status == "ok"
    assert rows["lora_ops"].note
    assert rows["lora_ops cuda"].status == "unavailable"


def test_every_suite_names_its_baseline() -> None:
    plan = Plan(shapes=((64, 64),), tokens=(2,), lora_shapes=((64, 64),), lora_tokens=(2,))
    for suite in SUITES.values():
        for comparison in suite(plan):
            assert set(comparison.slowest_of or (comparison.baseline,)) <= comparison.makers.keys()
            assert "lora_ops" in comparison.makers


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError):
        write_with(path, lambda beside: beside.write_text("half") and 1 / 0)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_cuda_clock_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop, on stand-ins for CUDA: a GPU at hand must not be lost to a slip in it."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy" if cycles > 1e5 else "too short"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    runs = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    times = CudaClock("cpu").interleave(runs, Effort(min_rounds=2, max_rounds=2, warmup=0))
    assert times == {"a": [0.002, 0.002], "b": [0.002, 0.002]}
    once = ["busy", "event", "a", "event", "wait", "busy", "event", "b", "event", "wait"]
    enqueued = ["wait", "a", "wait", "a", "wait", "b", "wait", "b"]  # to see how long the host takes
    assert log == [*enqueued, "wait", *once, *once]


def test_a_step_begins_and_ends_with_an_idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    times = StepClock("cuda").interleave({"a": lambda: log.append("a")}, Effort(1, 1, 0.0, 0))
    assert len(times["a"]) == 1
    assert log == ["wait", "a", "wait"]


def test_ceilings_are_positive() -> None:
    from bench.ceilings import measure_ceilings

    found = measure_ceilings(CpuClock(), "cpu", torch.float32, copy_bytes=1 << 16, gemm=16)
    assert min(found.as_dict().values()) > 0
