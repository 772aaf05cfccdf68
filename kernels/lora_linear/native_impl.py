"""Linear layer with a low-rank update on the CPU: base products by torch's GEMM, the low-rank terms in float32 by rows.

The formulas are those of reference.py. The base product runs in the activations' dtype (float32 accumulation inside),
so that 16-bit activations use the machine's 16-bit instructions; y is rounded once more when the low-rank term is
added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_ops.kernels.lora_linear import reference
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4_codec import native_impl as codec
from lora_ops.quant.nf4_linear.reference import as_matrix, row_chunks


def _dense(weight: Tensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    return codec.dequantize_nf4(weight, dtype) if isinstance(weight, NF4Tensor) else weight


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
    (n, k), r = weight.shape, lora_a.shape[0]
    y = linear(x, _dense(weight, x.dtype), bias)  # [..., K] @ [K, N] -> [..., N]
    x2, y2 = as_matrix(x), as_matrix(y)
    a, b = lora_a.float(), lora_b.float() * scale.float()
    s = x.new_empty(x2.shape[0], r, dtype=torch.float32)
    for rows in row_chunks(x2.shape[0], max(n, k)):
        s[rows] = reference.drop(x2[rows].float(), rows, dropout_p, seed) @ a.T  # [rows, K] @ [K, R] -> [rows, R]
        if y.dtype == torch.float32:
            y2[rows].addmm_(s[rows], b.T)  # [rows, R] @ [R, N] -> [rows, N]
        else:
            y2[rows] = torch.addmm(y2[rows].float(), s[rows], b.T)
    return y, s.view(*x.shape[:-1], r)


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
    needs: reference.Needs,
) -> reference.Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    base = as_matrix(dy) @ _dense(weight, dy.dtype) if needs[0] else dy.new_empty(0)  # [M, N] @ [N, K] -> [M, K]

    def base_dx(rows: slice, dy_rows: Tensor) -> Tensor:
        return base[rows].float()

    return reference.low_rank_backward(dy, x, s, base_dx, lora_a, lora_b, scale, dropout_p, seed, needs)


def declines(op: str, lead: Tensor, *args: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    weight = args[0] if op == "lora_linear" else args[2]
    if isinstance(weight, NF4Tensor):
        return codec.declines("dequantize_nf4", weight, lead.dtype)
    if lead.device.type != "cpu":
        return f"native kernels run on cpu, not on {lead.device.type}"
    return f"native kernels have no {lead.dtype}" if lead.dtype == torch.float64 else None


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
