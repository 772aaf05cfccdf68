"""Linear layer with a low-rank update on the CPU: base products by torch's GEMM or the NF4 kernels, the rest by csrc.

Where the C library multiplies with W in bfloat16 (NF4 or dense, on AVX-512-BF16), the low-rank term is R more terms of
the same sums. Elsewhere it is added row by row, in float32, to a product that was rounded before. The backward reads dY
once for dS, dB and db, and x once for dA, besides the product with W. The formulas are those of reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_ops.kernels.lora_linear.reference import Grads, Needs
from lora_ops.kernels.philox import threshold
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4_codec import native_impl as codec
from lora_ops.quant.nf4_linear import native_impl as nf4
from lora_ops.quant.nf4_linear.reference import as_matrix
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import as_output


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with unit stride along K, a view where x's strides allow it."""
    if x.dim() != 2:  # a reshape that changes nothing takes 1 µs, of 200 for a layer in generation
        x = as_matrix(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _adapter(a: Tensor, b: Tensor, scale: Tensor, dropout_p: float, seed: Tensor | None) -> native.Adapter:
    if seed is None:
        return native.adapter(a, b, float(scale))
    return native.adapter(a, b, float(scale), threshold(dropout_p), int(seed))


def _weight(weight: Tensor | NF4Tensor) -> native.Weight | None:
    """The weight as the C library multiplies it, or None where torch does."""
    if isinstance(weight, NF4Tensor):
        return codec.weight_of(weight).operand
    if weight.stride(1) == 1 and native.takes_dense(weight.dtype):
        return native.dense_weight(weight)
    return None


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [..., N] in x's dtype and S [..., R] in float32."""
    x2, a, b = _rows(x), lora_a.contiguous(), lora_b.contiguous()
    bias = None if bias is None else bias.contiguous()
    w = _weight(weight)
    # [M, K] @ [K, N] -> [M, N]
    y = x2.new_empty(x2.shape[0], b.shape[0]) if w else linear(x2, cast(Tensor, weight), bias)
    if x.dim() == 2:
        s = torch.empty(x2.shape[0], a.shape[0], dtype=torch.float32)
        native.lora_forward(_adapter(a, b, scale, dropout_p, seed), x2, s, y, w, bias)
        return y, s
    lead = x.shape[:-1]
    s = torch.empty(*lead, a.shape[0], dtype=torch.float32)
    native.lora_forward(_adapter(a, b, scale, dropout_p, seed), x2, s, y, w, bias)
    return as_output(y, (*lead, b.shape[0])), s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    needs_x, needs_a, needs_b, needs_bias = needs
    dy2, a, b = _rows(dy), lora_a.contiguous(), lora_b.contiguous()
    w = _weight(weight) if needs_x else None
    dx = None
    if needs_x:
        # [M, N] @ [N, K] -> [M, K]
        dx = dy2.new_empty(dy2.shape[0], a.shape[1]) if w else dy2 @ cast(Tensor, weight)
    da = torch.empty_like(a) if needs_a else None
    db = torch.empty_like(b) if needs_b else None
    dbias = dy.new_empty(b.shape[0]) if needs_bias else None
    native.lora_backward(
        _adapter(a, b, scale, dropout_p, seed),
        dy2,
        _rows(x) if needs_a and x is not None else None,
        s.contiguous() if needs_b and s is not None else None,
        w,
        dx=dx,
        dlora_a=da,
        dlora_b=db,
        dbias=dbias,
    )
    if dx is not None and dy.dim() != 2:
        dx = as_output(dx, (*dy.shape[:-1], a.shape[1]))
    return dx, da, db, dbias


def declines(op: str, lead: Tensor, *args: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    weight = args[0] if op == "lora_linear" else args[2]
    if 0 in weight.shape:
        return f"native LoRA kernels have no weights of shape {tuple(weight.shape)}"
    if isinstance(weight, NF4Tensor):
        return nf4.declines("nf4_linear", lead, weight)
    if not lead.is_cpu:
        return f"native kernels run on cpu, not on {lead.device.type}"
    return f"native kernels have no {lead.dtype}" if lead.dtype == torch.float64 else None


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
