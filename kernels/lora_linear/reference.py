"""Linear layer with a low-rank update in plain PyTorch, accumulated in float32 (float64 for float64 operands).

Forward, with D = mask · keep_scale (all ones without dropout):
    S  = (D ∘ x) Aᵀ                                  # [M, K] @ [K, R] -> [M, R]
    y  = x Wᵀ + b + scale · S Bᵀ                     # [M, K] @ [K, N] + [M, R] @ [R, N] -> [M, N]

Backward:
    dS = scale · dY B                                # [M, N] @ [N, R] -> [M, R]
    dB = scale · dYᵀ S                               # [N, M] @ [M, R] -> [N, R]
    dA = dSᵀ (D ∘ x)                                 # [R, M] @ [M, K] -> [R, K]
    dX = dY W + D ∘ (dS A)                           # [M, N] @ [N, K] + [M, R] @ [R, K] -> [M, K]
    db = Σ_m dY                                      # [N]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ops.kernels.philox import dropout_mask, keep_scale
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4_codec.reference import dequantize_nf4
from lora_ops.quant.nf4_linear.reference import accumulate_dtype, as_matrix, row_chunks
from lora_ops.runtime.dispatch import as_output

Needs = tuple[bool, bool, bool, bool]  # dX, dA, dB, db
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _dense(weight: Tensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] as the activations' dtype holds it, widened to the accumulator's dtype."""
    w = dequantize_nf4(weight, dtype) if isinstance(weight, NF4Tensor) else weight
    return w.to(accumulate_dtype(dtype))


def drop(x: Tensor, rows: slice, p: float, seed: Tensor | None) -> Tensor:
    """D ∘ x for the given rows of the whole tensor."""
    if seed is None:
        return x
    return torch.where(dropout_mask(rows, x.shape[1], p, seed), x * keep_scale(p), 0.0)


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
    """y [..., N] in x's dtype and S [..., R] in the accumulator's dtype."""
    acc = accumulate_dtype(x.dtype)
    (n, k), r = weight.shape, lora_a.shape[0]
    w, a, b, scale = _dense(weight, x.dtype), lora_a.to(acc), lora_b.to(acc), scale.to(x.device, acc)
    x2 = as_matrix(x)
    y, s = x.new_empty(x2.shape[0], n), x.new_empty(x2.shape[0], r, dtype=acc)
    for rows in row_chunks(x2.shape[0], max(n, k)):
        x_rows = x2[rows].to(acc)
        s[rows] = drop(x_rows, rows, dropout_p, seed) @ a.T  # [rows, K] @ [K, R] -> [rows, R]
        y_rows = x_rows @ w.T + scale * (s[rows] @ b.T)  # [rows, K] @ [K, N] + [rows, R] @ [R, N] -> [rows, N]
        y[rows] = y_rows if bias is None else y_rows + bias.to(acc)
    return as_output(y, (*x.shape[:-1], n)), as_output(s, (*x.shape[:-1], r))


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
    w = _dense(weight, dy.dtype) if needs[0] else dy.new_empty(0)

    def base_dx(rows: slice, dy_rows: Tensor) -> Tensor:
        return dy_rows @ w  # [rows, N] @ [N, K] -> [rows, K]

    return low_rank_backward(dy, x, s, base_dx, lora_a, lora_b, scale, dropout_p, seed, needs)


def low_rank_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    base_dx: Callable[[slice, Tensor], Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Grads:
    """The same, given base_dx(rows, dY[rows]) = (dY W)[rows] in the accumulator's dtype."""
    needs_x, needs_a, needs_b, needs_bias = needs
    acc = accumulate_dtype(dy.dtype)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    a, b, scale = lora_a.to(acc), lora_b.to(acc), scale.to(dy.device, acc)
    dy2 = as_matrix(dy)
    m = dy2.shape[0]
    dx = dy.new_empty(m, k) if needs_x else None
    da = torch.zeros(r, k, dtype=acc, device=dy.device) if needs_a else None
    db = torch.zeros(n, r, dtype=acc, device=dy.device) if needs_b else None
    dbias = torch.zeros(n, dtype=acc, device=dy.device) if needs_bias else None
    for rows in row_chunks(m, max(n, k)):
        dy_rows = dy2[rows].to(acc)
        ds = scale * (dy_rows @ b)  # [rows, N] @ [N, R] -> [rows, R]
        if dx is not None:
            dx[rows] = base_dx(rows, dy_rows) + drop(ds @ a, rows, dropout_p, seed)  # [rows, R] @ [R, K] -> [rows, K]
        if da is not None and x is not None:
            da += ds.T @ drop(as_matrix(x)[rows].to(acc), rows, dropout_p, seed)  # [R, rows] @ [rows, K] -> [R, K]
        if db is not None and s is not None:
            db += scale * (dy_rows.T @ as_matrix(s)[rows])  # [N, rows] @ [rows, R] -> [N, R]
        if dbias is not None:
            dbias += dy_rows.sum(0)
    return (
        None if dx is None else as_output(dx, (*dy.shape[:-1], k)),
        None if da is None else da.to(lora_a.dtype),
        None if db is None else db.to(lora_b.dtype),
        None if dbias is None else dbias.to(dy.dtype),
    )


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
