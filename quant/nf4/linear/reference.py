"""Linear layer over an NF4 weight in plain PyTorch: y = x Wᵀ + b and dX = dY · W, accumulated in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.codec.reference import dequantize_nf4
from lora_ops.runtime.dispatch import as_output

CHUNK_BYTES = 1 << 20  # of activations that are widened at a time, so that no float32 copy of x is made


def row_chunks(m: int, width: int) -> list[slice]:
    """Slices of m rows of `width` float32 values, each of at most CHUNK_BYTES (but at least one row)."""
    rows = max(1, CHUNK_BYTES // (4 * max(width, 1)))
    return [slice(begin, min(begin + rows, m)) for begin in range(0, m, rows)]


def as_matrix(x: Tensor) -> Tensor:
    """[..., K] as [M, K], a view where x's strides allow it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nf4_linear(*, x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    acc = accumulate_dtype(x.dtype)
    n, k = q.shape
    x2 = as_matrix(x)
    w = dequantize_nf4(q, x.dtype).to(acc)
    y = x.new_empty(x2.shape[0], n)
    for rows in row_chunks(x2.shape[0], max(n, k)):
        y_rows = x2[rows].to(acc) @ w.T  # [rows, K] @ [K, N] -> [rows, N]
        y[rows] = y_rows if bias is None else y_rows + bias.to(acc)
    return as_output(y, (*x.shape[:-1], n))


def nf4_linear_dx(*, dy: Tensor, q: NF4Tensor) -> Tensor:
    """dy [..., N], q (N, K) -> dX [..., K]."""
    acc = accumulate_dtype(dy.dtype)
    n, k = q.shape
    dy2 = as_matrix(dy)
    w = dequantize_nf4(q, dy.dtype).to(acc)
    dx = dy.new_empty(dy2.shape[0], k)
    for rows in row_chunks(dy2.shape[0], max(n, k)):
        dx[rows] = (dy2[rows].to(acc) @ w).to(dy.dtype)  # [rows, N] @ [N, K] -> [rows, K]
    return as_output(dx, (*dy.shape[:-1], k))


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear, "nf4_linear_dx": nf4_linear_dx}
