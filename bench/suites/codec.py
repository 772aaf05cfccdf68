"""NF4 quantize and dequantize against bitsandbytes; the baseline of dequantize is a copy of the dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.measure import Comparison, Contender, Unavailable
from bench.peers import bnb_state, load
from bench.plan import Plan
from bench.suites.common import ours, tensor_bytes
from lora_ops.functional import dequantize_nf4, quantize_nf4
from lora_ops.quant.nf4 import NF4Tensor
from tests.cases import codec_weight, rounded_weight, wrong_quantization


def _from_bnb(packed: Tensor, state: object, dtype: torch.dtype) -> NF4Tensor:
    s, nested = state, getattr(state, "state2", None)
    return NF4Tensor(
        packed, s.absmax, tuple(s.shape), dtype, s.blocksize,  # type: ignore[attr-defined]
        None if nested is None else nested.absmax,
        None if nested is None else s.offset,  # type: ignore[attr-defined]
    )  # fmt: skip


def quantize(plan: Plan) -> Iterator[Comparison]:
    """Quantize, with and without double quantization."""
    for n, k in plan.shapes:
        for double_quant in (False, True):
            w = codec_weight(n, k, dtype=plan.dtype, device=plan.device)

            def lora_ops(w: Tensor = w, dq: bool = double_quant) -> Contender:
                def run() -> NF4Tensor:
                    return quantize_nf4(w, double_quant=dq)

                return Contender(run, lambda: wrong_quantization(w, run()), tensor_bytes(w, run()))

            def bitsandbytes(w: Tensor = w, dq: bool = double_quant) -> Contender:
                functional = load("bitsandbytes").functional

                def run() -> tuple[Tensor, object]:
                    return functional.quantize_4bit(w, blocksize=64, compress_statistics=dq, quant_type="nf4")

                q = _from_bnb(*run(), w.dtype)
                return Contender(run, lambda: wrong_quantization(w, q), tensor_bytes(w, q))

            yield Comparison(
                "quantize", "double" if double_quant else "", 0, n, k,
                # A scale, a search among 16 and a maximum: no GEMM, so no arithmetic limit.
                flops=0.0, baseline="bitsandbytes",
                makers={**ours(plan, lora_ops), "bitsandbytes": bitsandbytes},
            )  # fmt: skip


def dequantize(plan: Plan) -> Iterator[Comparison]:
    """Dequantize into a fresh tensor, into a given one, and into one that then holds the transpose."""
    for n, k in plan.shapes:
        for double_quant in (False, True):
            w = codec_weight(n, k, dtype=plan.dtype, device=plan.device)
            q = quantize_nf4(w, double_quant=double_quant)
            for into in ("fresh", "out=", "out=buffer.t()"):
                yield _dequantize(plan, q, into)


def _dequantize(plan: Plan, q: NF4Tensor, into: str) -> Comparison:
    fresh, transposed = into == "fresh", into == "out=buffer.t()"
    expected = rounded_weight(q, plan.dtype)
    n, k = q.shape

    def contender(run: Callable[[], Tensor], read: int) -> Contender:
        def check() -> str | None:
            got = run()
            differ = int((got != expected).sum()) if got.shape == expected.shape else expected.numel()
            return f"{differ} of {expected.numel()} values differ from code · absmax rounded" if differ else None

        return Contender(run, check, read + expected.nbytes)

    def out() -> Tensor:
        buffer = torch.full((k, n) if transposed else (n, k), float("nan"), dtype=plan.dtype, device=plan.device)
        return buffer.t() if transposed else buffer

    def lora_ops() -> Contender:
        if fresh:
            return contender(lambda: dequantize_nf4(q), q.nbytes)
        target = out()
        return contender(lambda: dequantize_nf4(q, out=target), q.nbytes)

    def bitsandbytes() -> Contender:
        functional, state = load("bitsandbytes").functional, bnb_state(q)
        if transposed:
            target = out()
            return contender(lambda: target.copy_(functional.dequantize_4bit(q.packed, state)), q.nbytes)
        if fresh:
            return contender(lambda: functional.dequantize_4bit(q.packed, state), q.nbytes)
        target = out()
        try:
            functional.dequantize_4bit(q.packed, state, out=target)
        except NotImplementedError as error:
            raise Unavailable(f"it has no dequantize into a given tensor on {plan.device}") from error
        return contender(lambda: functional.dequantize_4bit(q.packed, state, out=target), q.nbytes)

    def copy() -> Contender:
        if fresh:
            return contender(expected.clone, expected.nbytes)
        target = out()
        return contender(lambda: target.copy_(expected), expected.nbytes)

    variant = into + (", double" if q.nested else "")
    makers = {**ours(plan, lora_ops), "copy of the dense weight": copy, "bitsandbytes": bitsandbytes}
    return Comparison("dequantize", variant, 0, n, k, 0.0, "copy of the dense weight", makers)
