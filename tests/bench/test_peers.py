"""Contenders written here are right for every case that they take, and refuse the others; compilation is bounded."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest
import torch

from bench import compiled, peers
from bench.by_hand import lora_as_unsloth, lora_by_addmm
from bench.clocks import CpuClock
from bench.compiled import compiling, time_limit
from bench.measure import Unavailable, measure
from bench.plan import Effort, Plan
from bench.suites import GPU_SUITES, SUITES
from bench.suites.common import Judge
from tests.bench.test_measure import CEILINGS
from tests.cases import LinearCase

EFFORT = Effort(min_rounds=1, max_rounds=1, seconds=0.0, warmup=0)
PLAN = Plan(
    lora_shapes=((64, 96),), lora_tokens=(33,), ranks=(4,), gpu_contenders=True, compiler="eager", effort=EFFORT
)


def never_done() -> None:
    """What only a signal ends."""
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_by_hand(weight: str, p: float) -> None:
    i = LinearCase(33, 64, 96, 4, torch.bfloat16, weight=weight, adapter_dtype=torch.float32, dropout_p=p).inputs()
    ways = {"addmm": lambda: lora_by_addmm(i, given_mask=True), "unsloth": lambda: lora_as_unsloth(i)}
    for name, make in ways.items():
        if p and name == "unsloth":
            with pytest.raises(Unavailable, match="no dropout"):
                make()
            continue
        x, a, b = (t.detach().requires_grad_() for t in (i.x, *i.adapter()))
        y = make()(x, a, b)
        dx, da, db = torch.autograd.grad(y, (x, a, b), i.dy)
        assert da.dtype == torch.float32
        assert Judge(i).wrong({"y": y.detach(), "dx": dx, "dlora_a": da, "dlora_b": db}) is None, name


def test_addmm_drops_what_it_says() -> None:
    """With a mask of its own: gradients and output agree on which elements were kept."""
    i = LinearCase(200, 8, 64, 64, torch.float32, weight="dense", dropout_p=0.25).inputs()
    x, b = torch.ones_like(i.x).requires_grad_(), i.adapter()[1]
    a = torch.eye(64).requires_grad_()  # S is the dropped x itself
    y = lora_by_addmm(i)(x, a, b)
    base = x.detach() @ i.weight.T  # type: ignore[union-attr]
    dx, da = torch.autograd.grad(y, (x, a), torch.ones_like(y))
    kept = dx != torch.ones_like(y) @ i.weight  # type: ignore[operator]
    assert 0.7 < kept.float().mean() < 0.8
    dropped = torch.where(kept, 1 / 0.75, 0.0)
    torch.testing.assert_close(y.detach(), base + 2.0 * dropped @ b.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(da, 2.0 * (torch.ones_like(y) @ b).T @ dropped, rtol=1e-4, atol=1e-3)


def test_a_bias_is_refused() -> None:
    inputs = LinearCase(2, 8, 8, 2, bias=True).inputs()
    for way in (lora_by_addmm, lora_as_unsloth):
        with pytest.raises(Unavailable, match="no bias"):
            way(inputs)


def test_contenders_of_the_gpu_suite() -> None:
    comparisons = {c.variant: c for c in SUITES["lora_linear"](PLAN)}
    dense, nf4 = (comparisons[f"{weight}, r=4, p=0, bfloat16 adapter"] for weight in ("dense", "nf4"))
    assert set(dense.makers) >= {"lora_ops K-step", "lora_ops β=1", "Unsloth's way", "addmm by hand", "PEFT"}
    assert set(nf4.makers) >= {"Unsloth's way", "addmm by hand", "PEFT + bitsandbytes"}
    assert not set(nf4.makers) & {"lora_ops K-step", "lora_ops β=1"}
    dense.makers.pop("PEFT")
    rows = measure(dense, CpuClock(), CEILINGS, EFFORT)
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]


def test_torch_compile_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ONE_S", math.inf)
    monkeypatch.setattr(compiled, "_spent", 0.0)
    monkeypatch.setattr(compiled, "ALL_S", math.inf)
    for comparison in GPU_SUITES["lora_compiled"](PLAN):
        rows = {row.contender: row for row in measure(comparison, CpuClock(), CEILINGS, EFFORT)}
        assert rows["torch.compile"].status == "ok", rows["torch.compile"].reason


def test_a_compilation_that_fails_or_takes_long_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = next(GPU_SUITES["lora_compiled"](PLAN))
    monkeypatch.setattr(torch, "compile", lambda fn, **options: lambda *args: never_done())
    monkeypatch.setattr(compiled, "ONE_S", 0.05)
    monkeypatch.setattr(compiled, "_spent", 0.0)
    rows = {row.contender: row for row in measure(comparison, CpuClock(), CEILINGS, EFFORT)}
    assert rows["torch.compile"].status == "failed"
    assert "not done after 0.05 s" in rows["torch.compile"].reason
    assert not rows["torch.compile"].bad
    assert rows["lora_ops"].status == "ok"
    monkeypatch.setattr(compiled, "_spent", 1e3)
    with pytest.raises(Unavailable, match="1000 s"), compiling():
        pass


def test_a_time_limit_is_lifted() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(3600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with pytest.raises(TimeoutError), time_limit(0.02):
        never_done()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_broken_peer_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that does not fit the machine's torch or driver may raise anything when it is imported."""
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match="broken_peer cannot be imported: RuntimeError: built for another torch"):
        peers.load("broken_peer")


@pytest.mark.parametrize(("ops", "note"), [(("rms_norm",), "none of its 1 groups"), (("lora", "rope"), "lora is not")])
def test_a_peer_that_gains_a_lora_layer_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ops: tuple[str, ...], note: str
) -> None:
    assert any("Liger Kernel: not installed" in found for found in peers.notes())
    folder = tmp_path / "liger_kernel" / "ops"
    folder.mkdir(parents=True)
    for name in ("__init__", *ops):
        (folder / f"{name}.py").touch()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert any(note in found for found in peers.notes())
