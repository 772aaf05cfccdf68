"""The step of a whole model: contenders agree before they are timed, and what is wired wrongly is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_ops
from bench.clocks import CpuClock
from bench.device import end_to_end as suite
from bench.device.context import Context
from bench.device.sections import DRY_PLAN
from bench.measure import Row, Run
from bench.report import _steps


def _run() -> Run:
    run = Run("test")
    for _ in suite.end_to_end(Context(DRY_PLAN, CpuClock(), run, dry=True)):
        pass
    return run


def test_contenders_agree_and_are_timed() -> None:
    run = _run()
    found = {(row.variant, row.contender): row for row in run.rows}
    assert {variant for variant, _ in found} == {"LoRA, p=0.1", "QLoRA, p=0.1"}
    assert {name for variant, name in found if variant.startswith("LoRA")} == {
        "lora_ops", "lora_ops, bf16 adapter", "PEFT", "PEFT, bf16 adapter"
    }  # fmt: skip
    assert {name for variant, name in found if variant.startswith("QLoRA")} == {
        "lora_ops", "lora_ops, bf16 adapter", "PEFT", "PEFT + bitsandbytes"
    }  # fmt: skip
    assert {row.status for row in run.rows} == {"ok"}, [row.reason for row in run.rows]
    assert all(row.note in ("native", "reference") for row in run.rows if row.ours)  # the fused op ran
    assert not any(row.note for row in run.rows if not row.ours)
    assert "2 layers" in run.notes[0]


@pytest.mark.parametrize("fault", ["scale", "quantized twice"])
def test_what_is_wired_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    inject = lora_ops.inject

    def wrong(model: Any, **options: Any) -> Any:
        model = inject(model, **options)
        for module in model.modules():
            if fault == "scale" and hasattr(module, "lora_A"):
                module.scaling["default"] *= 1.1
            elif fault != "scale" and isinstance(module, lora_ops.nn.NF4Linear):
                q = lora_ops.functional.quantize_nf4(module.quantized.dequantize(), block_size=4096)
                module.weight.data, module.weight_absmax.data = q.packed, q.absmax.view(torch.int32)
                module.weight_nested_absmax = module.weight_nested_offset = None
                module.block_size = 4096
        return model

    monkeypatch.setattr(suite.lora_ops, "inject", wrong)
    rows = [row for row in _run().rows if row.ours and (fault == "scale" or row.variant.startswith("QLoRA"))]
    assert rows
    assert {row.status for row in rows} == {"wrong"}
    assert all("gradients of lora_A: relative error" in row.reason for row in rows)


def test_contenders_share_the_base_and_hold_equal_adapters() -> None:
    base = suite.build(suite.DRY, "cpu", torch.bfloat16)
    first, second = suite._peft(base, suite.DRY, True), lora_ops.inject(suite._peft(base, suite.DRY, False))
    name = "model.layers.0.mlp.down_proj"
    weights = [m.get_submodule(f"base_model.model.{name}").base_layer.weight for m in (first, second)]
    assert weights[0] is weights[1] is base.get_submodule(name).weight
    a, b = suite.adapters(first), suite.adapters(second)
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n].float()) and a[n].any() for n in a)
    assert {t.dtype for t in a.values()} == {torch.float32}
    assert {t.dtype for t in b.values()} == {torch.bfloat16}
    suite.set_dropout(second, 0.25)
    drops = [d.p for m in second.modules() if hasattr(m, "lora_dropout") for d in m.lora_dropout.values()]
    assert drops == [0.25] * len(suite.targets(base))


def test_peak_memory_is_the_model_s_and_what_a_step_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for CUDA's counters: other contenders' memory, allocated before the step, does not count."""
    log: list[str] = []
    weight = SimpleNamespace(data_ptr=lambda: 1, nbytes=100, is_cuda=True)
    model: Any = SimpleNamespace(parameters=lambda: iter([weight, weight]), buffers=lambda: iter([]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: log.append("before") or 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: log.append("peak") or 1030)
    assert suite._peak(model, lambda: log.append("step")) == 130
    assert log == ["wait", "before", "reset", "step", "wait", "peak"]


def test_without_peft_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run = _run()
    assert not run.rows
    assert not run.bad
    assert "end to end: not run: peft cannot be imported" in run.notes[0]


def test_steps_in_the_report() -> None:
    row = Row("end_to_end", "LoRA, p=0", 8192, 4096, 14336, 16, "lora_ops", "ok", note="triton", median_ms=100.0,
              p10_ms=99.0, p90_ms=101.0, over_baseline=0.8, baseline="PEFT", peak_gib=12.34)  # fmt: skip
    lines = _steps([row])
    assert lines[2] == "| LoRA, p=0 | 8192 | **lora_ops** (triton) | 81,920 | 100 | 99–101 | 0.80 | 12.3 |"
