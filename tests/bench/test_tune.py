"""The crossovers follow from the times, by a clock that makes them up; what is measured is written and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu
from bench import measure as measuring
from bench.clocks import CpuClock
from bench.device import child, sections, tune
from bench.device.context import Context
from bench.device.tune import NEVER, QUESTIONS, Question, Route, best_split
from bench.measure import Comparison, Contender, Row, Run
from bench.plan import Effort, Plan
from bench.suites import nf4_linear
from lora_ops import trace
from lora_ops.runtime import crossovers as table
from lora_ops.runtime.crossovers import Crossovers, crossovers
from lora_ops.runtime.triton_launch import record_launches

PLAN = Plan(
    shapes=((8, 64),), lora_shapes=((8, 64),), ranks=(2,), dropouts=(0.0, 0.5), adapter_dtypes=(torch.float32,),
    gpu_contenders=True, effort=Effort(min_rounds=1, max_rounds=1, seconds=0.0, warmup=0),
)  # fmt: skip


class MadeUpClock:
    """Runs each call once, and answers what `seconds(tokens, crossovers in force)` says that it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, Crossovers], float]) -> None:
        self.seconds, self.forced = seconds, Crossovers()
        real = table.force

        def watched(**changes: int) -> Any:
            self.forced = replace(Crossovers(), **changes)
            return real(**changes)

        monkeypatch.setattr("bench.suites.common.force", watched)

    def interleave(self, runs: Any, effort: Effort) -> dict[str, list[float]]:
        times = {}
        for name, run in runs.items():
            with trace() as record:
                run()
            lead = next((call for call in record.calls if call.op != "lora_linear_backward"), record.calls[0])
            times[name] = [self.seconds(math.prod(lead.shape[:-1]), self.forced)]
        return times


def _tuned(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, Crossovers], float], *fields: str) -> Run:
    monkeypatch.setattr(measuring, "gc", SimpleNamespace(collect=lambda: 0))  # slow where much is imported
    run = Run("made up")
    asked = [question for question in QUESTIONS if question.field in fields]
    for _ in tune.tune(Context(PLAN, MadeUpClock(monkeypatch, seconds), run), asked):
        pass
    assert {row.status for row in run.rows} == {"ok"}
    return run


def test_the_split_that_costs_least() -> None:
    assert best_split([]) == 0
    assert best_split([0.5, 0.8, 1.2, 3.0]) == 2
    assert best_split([1.5, 2.0]) == 0
    assert best_split([0.5, 0.9]) == 2
    assert best_split([0.4, 1.05, 0.6, 2.0]) == 3  # one noisy number does not end it
    assert best_split([1.02, 0.99, 1.5]) == 0


def test_gemm_against_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _tuned(monkeypatch, lambda m, c: m / 200 if c.nf4_gemm_max_m else 1.0, "nf4_gemm_max_m")
    assert run.crossovers == {"nf4_gemm_max_m": 192}
    assert {row.variant for row in run.rows} == {"nf4_linear", "nf4_linear_dx"}
    assert "by tokens: 16: 0.08, " in run.notes[0]


def test_kstep_against_beta_1(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _tuned(monkeypatch, lambda m, c: 1.0 if c.kstep_min_m else 3000 / m, "kstep_min_m")
    assert run.crossovers == {"kstep_min_m": 4096}
    assert len(run.rows) == 2 * 5 * len(PLAN.dropouts)


@pytest.mark.parametrize(
    ("field", "equal_at", "expected"),
    [
        ("nf4_gemm_max_m", 10, 0), ("nf4_gemm_max_m", 40, 32), ("nf4_gemm_max_m", 9999, 512),
        ("kstep_min_m", 1, 512), ("kstep_min_m", 1000, 1024), ("kstep_min_m", 99999, NEVER),
    ],
)  # fmt: skip
def test_the_ends_of_the_scale(field: str, equal_at: float, expected: int) -> None:
    (question,) = [question for question in QUESTIONS if question.field == field]

    def row(name: str, m: int, n: int, ms: float) -> Row:
        return Row("op", "", m, n, 64, 0, f"lora_ops {name}", "ok", median_ms=ms)

    rows = [row(question.few.name, m, n, n * m / equal_at) for m in question.tokens for n in (1, 2)]
    rows += [row(question.many.name, m, n, n) for m in question.tokens for n in (1, 2)]
    value, ratios = tune.answer(question, rows)
    assert value == expected
    assert ratios == {m: pytest.approx(m / equal_at) for m in question.tokens}


def test_gemv_against_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _tuned(monkeypatch, lambda m, c: 0.3 * m if c.nf4_gemv_max_m else 1.0, "nf4_gemv_max_m")
    assert run.crossovers == {"nf4_gemv_max_m": 3}


def test_a_route_without_times_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure", lambda *args: [])
    run = Run("broken")
    for _ in tune.tune(Context(PLAN, CpuClock(), run), QUESTIONS[:1]):
        pass
    assert run.crossovers == {}
    assert "not measured" in run.notes[0]


@pytest.fixture
def _wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nf4_linear.nf4_linear
    monkeypatch.setattr(nf4_linear, "nf4_linear", lambda *args: right(*args) * 1.02)


@pytest.mark.usefixtures("_wrong_op")
def test_a_wrong_route_is_neither_timed_nor_chosen() -> None:
    run = Run("wrong")
    for _ in tune.tune(Context(PLAN, CpuClock(), run), QUESTIONS[:1]):
        pass
    assert {row.status for row in run.rows} == {"wrong"}
    assert run.bad
    assert run.crossovers == {}


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.field)
def test_each_route_launches_its_own_kernels(question: Question) -> None:
    """On tensors that only have shapes: what is timed under a name is what runs under it."""
    pytest.importorskip("triton")
    from lora_ops.kernels.lora_linear import triton_impl as lora
    from lora_ops.kernels.lora_linear.operands import Adapter
    from lora_ops.quant.nf4.linear import triton_impl as nf4
    from tests.gpu_proof.expect import meta_nf4

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def kernels(route: Route, m: int) -> set[str]:
        with record_launches(run=False) as record, table.force(**route.forced):
            if question.field == "kstep_min_m":
                adapter = Adapter(meta(16, 512), meta(256, 16), torch.tensor(2.0))
                lora.lora_linear(x=meta(m, 512), weight=meta(256, 512), adapter=adapter, bias=None)
            else:
                nf4.matmul(meta(m, 512), meta_nf4(256, 512, nested=True), transposed=True)
        return {launch.kernel.__name__ for launch in record.launches}

    own = {"GEMV": "_nf4_gemv_kernel", "GEMM": "_nf4_gemm_kernel", "decode + cuBLAS": "_dequantize_nf4_kernel",
           "β=1": "_expand_kernel", "K-step": "_lora_gemm_kernel"}  # fmt: skip
    for m in question.tokens:
        for route in (question.few, question.many):
            assert kernels(route, m) & set(own.values()) == {own[route.name]}


def test_every_field_is_asked_for() -> None:
    assert {question.field for question in QUESTIONS} == set(vars(Crossovers()))


def test_times_are_taken_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def contender() -> Contender:
        return Contender(lambda: seen.append(crossovers(torch.device("cpu")).nf4_gemm_max_m), lambda: None, 0)

    comparison = Comparison("lora_generation", "", 1, 1, 1, 0.0, "lora_ops", {"lora_ops": contender})
    monkeypatch.setitem(sections.SUITES, "lora_generation", lambda plan: iter([comparison]))
    run = Run("r", crossovers={"nf4_gemm_max_m": 77})
    for _ in sections.SECTIONS["time lora_generation"](Context(PLAN, CpuClock(), run, dry=True)):
        pass
    assert set(seen) == {77}
    assert crossovers(torch.device("cpu")).nf4_gemm_max_m != 77


def test_without_triton_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "backends_of", lambda op, device: {"triton": "not installed", "reference": None})
    run = Run("r")
    assert list(sections.SECTIONS["tune"](Context(PLAN, CpuClock(), run))) == ["no routes to choose from"]
    assert "not measured" in run.notes[0]
    assert not run.crossovers


def test_the_command_writes_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(args: Any, left: list[str], path: Path, deadline: float, told: Any) -> str:
        return "" if child.run_sections(left, path, deadline=deadline, dry=args.dry_run) == 0 else "failed"

    monkeypatch.setattr(gpu, "_run_child", here)  # without a process of its own, or long collections
    monkeypatch.setattr(measuring, "gc", SimpleNamespace(collect=lambda: 0))
    assert gpu.main(["--dry-run", "--tune", "--output", str(tmp_path)]) == 0
    (entry,) = json.loads((tmp_path / "crossovers.json").read_text()).values()
    assert set(entry) == set(vars(Crossovers()))
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {**entry, **run["crossovers"]} == entry
    assert set(run["crossovers"]) == set(entry)
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'crossovers.json'}" in out
    assert "MEASURED" in out


def test_a_wrong_route_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("r", crossovers={"kstep_min_m": 1}, failures=[{"section": "tune", "reason": "out of luck"}])
    gpu._install(run, tmp_path, {})
    assert "not written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
