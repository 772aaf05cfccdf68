"""The table of aims: the worst row decides, a wrong result misses, what was not measured says so."""

from __future__ import annotations

from typing import Any

import pytest

from bench.device.aims import AIMS, judge
from bench.measure import Row, Run
from bench.report import markdown


def _row(op: str, contender: str, m: int, ms: float | None, ratio: float | None = None, **changes: Any) -> Row:
    fields = {"variant": "", "n": 4096, "k": 4096, "r": 0, "status": "ok", "median_ms": ms, "over_baseline": ratio}
    return Row(**{"op": op, "contender": contender, "m": m, **fields, **changes})


def _lora(contender: str, ratio: float | None, p: float = 0.0, m: int = 8192, **changes: Any) -> Row:
    variant = f"dense, r=16, p={p:g}, bfloat16 adapter"
    return _row("lora_linear", contender, m, ratio, ratio, r=16, **{"variant": variant, **changes})


def _verdict(rows: list[Row], text: str) -> tuple[str, float | None]:
    (aim,) = [aim for aim in judge(rows) if aim["aim"].startswith(text)]
    return aim["verdict"], aim["worst"]


def test_nothing_measured() -> None:
    assert {aim["verdict"] for aim in judge([])} == {"unmeasured"}
    assert len(judge([])) == len(AIMS)


def test_the_worst_row_decides() -> None:
    near = _lora("lora_ops K-step", 1.10)
    assert _verdict([near], "lora_linear K-step, M") == ("reached", 1.10)
    fp32 = _lora("lora_ops K-step", 1.13, variant="dense, r=16, p=0, float32 adapter")
    assert _verdict([near, fp32], "lora_linear K-step, M") == ("missed", 1.13)


def test_dropout_shape_and_route_have_aims_of_their_own() -> None:
    rows = [_lora("lora_ops K-step", 1.15, p=0.1), _lora("lora_ops", 9.0), _lora("lora_ops K-step", 9.0, m=2048)]
    assert _verdict(rows, "lora_linear K-step, M") == ("unmeasured", None)
    assert _verdict(rows, "lora_linear K-step, the same with") == ("reached", 1.15)
    assert _verdict(rows, "lora_linear β=1") == ("unmeasured", None)
    both = [_lora("lora_ops β=1", 1.16), _lora("lora_ops β=1", 1.18, p=0.1)]
    assert _verdict(both, "lora_linear β=1") == ("missed", 1.18)


def test_a_wrong_result_misses() -> None:
    rows = [_lora("lora_ops K-step", 1.0), _lora("lora_ops K-step", None, status="wrong")]
    assert _verdict(rows, "lora_linear K-step, M")[0] == "missed"
    assert _verdict([_lora("lora_ops K-step", None, status="unavailable")], "lora_linear K-step, M")[0] == "unmeasured"


def test_the_faster_of_two_peers_counts() -> None:
    rows = [_lora("lora_ops", 1.2), _lora("eager PEFT formula", 1.4)]
    assert _verdict(rows, "lora_linear over the faster") == ("reached", pytest.approx(1.2 / 1.4))
    rows += [_lora("addmm by hand", 1.1), _lora("addmm by hand", 0.1, p=0.1)]  # the latter is another comparison
    assert _verdict(rows, "lora_linear over the faster") == ("missed", pytest.approx(1.2 / 1.1))


def test_speed_ups() -> None:
    rows = [_row("nf4_linear", "lora_ops", m, ms, ms) for m, ms in ((1, 0.4), (16, 0.5), (64, 0.8), (4096, 1.04))]
    assert _verdict(rows, "nf4_linear, M = 1,") == ("reached", 2.5)
    assert _verdict(rows, "nf4_linear, M = 16") == ("unmeasured", None)  # no bitsandbytes
    assert _verdict(rows, "nf4_linear, M ≥ 4096") == ("reached", 1.04)
    rows += [_row("nf4_linear", "bitsandbytes", m, 1.0) for m in (16, 64)]
    assert _verdict(rows, "nf4_linear, M = 16") == ("missed", 1.25)


def test_kernels_that_are_off_by_default_have_aims_of_their_own() -> None:
    rows = [_row("nf4_linear", name, 1, ms, ms) for name, ms in (("lora_ops", 0.6), ("lora_ops cuda", 0.4))]
    assert _verdict(rows, "nf4_linear, M = 1,") == ("missed", pytest.approx(1 / 0.6))
    assert [aim["verdict"] for aim in judge(rows) if aim["aim"].endswith("kernels, M = 1")] == ["reached"]


def test_the_report_shows_them() -> None:
    run = Run("gpu", aims=judge([_row("nf4_linear", "lora_ops", 1, 1.0, 1.0)]))
    about = {"cpu": "c", "cores": 1, "threads": 1, "cpu_capability": "", "load_at_start": 0, "native": "", "date": "",
             "command": "", "commit": "", "versions": {}}  # fmt: skip
    text = markdown(about, [run])
    assert "| nf4_linear, M = 1, times as fast as dense | ≥ 2 | 1 | 1 | **missed** |" in text
    assert text.count("| unmeasured |") == len(AIMS) - 1
