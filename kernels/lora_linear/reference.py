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

from lora_ops.kernels.lora_linear.operands import Adapter, Grads, Needs
from lora_ops.kernels.philox import dropout_mask, keep_scale
from lora_ops.quant.frozen import FrozenTensor
from lora_ops.quant.nf4.linear.reference import accumulate_dtype, as_matrix, row_chunks
from lora_ops.runtime.dispatch import as_output


def widened(weight: Tensor | FrozenTensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] as the activations' dtype holds it, widened to the accumulator's dtype."""
    w = weight.decode(dtype) if isinstance(weight, FrozenTensor) else weight
    return w.to(accumulate_dtype(dtype))


def drop(x: Tensor, rows: slice, adapter: Adapter) -> Tensor:
    """D ∘ x for the given rows of the whole tensor."""
    if adapter.seed is None:
        return x
    mask = dropout_mask(rows, x.shape[1], adapter.dropout_p, adapter.seed)
    return torch.where(mask, x * keep_scale(adapter.dropout_p), 0.0)


def lora_linear(
    *, x: Tensor, weight: Tensor | FrozenTensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [..., N] in x's dtype and S [..., R] in the accumulator's dtype."""
    acc = accumulate_dtype(x.dtype)
    (n, k), r = weight.shape, adapter.lora_a.shape[0]
    w, scale = widened(weight, x.dtype), adapter.scale.to(x.device, acc)
    lora_a, lora_b = adapter.lora_a.to(acc), adapter.lora_b.to(acc)
    x2 = as_matrix(x)
    y, s = x.new_empty(x2.shape[0], n), x.new_empty(x2.shape[0], r, dtype=acc)
    for rows in row_chunks(x2.shape[0], max(n, k)):
        x_rows = x2[rows].to(acc)
        s[rows] = drop(x_rows, rows, adapter) @ lora_a.T  # [rows, K] @ [K, R] -> [rows, R]
        y_rows = x_rows @ w.T + scale * (s[rows] @ lora_b.T)  # [rows, K] @ [K, N] + [rows, R] @ [R, N] -> [rows, N]
        y[rows] = y_rows if bias is None else y_rows + bias.to(acc)
    return as_output(y, (*x.shape[:-1], n)), as_output(s, (*x.shape[:-1], r))


def lora_linear_backward(
    *,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | FrozenTensor,
    adapter: Adapter,
    needs: Needs,
) -> Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    acc = accumulate_dtype(dy.dtype)
    lora_a, lora_b, scale = adapter.lora_a.to(acc), adapter.lora_b.to(acc), adapter.scale.to(dy.device, acc)
    (r, k), n = lora_a.shape, lora_b.shape[0]
    dy2 = as_matrix(dy)
    m = dy2.shape[0]
    w = widened(weight, dy.dtype) if needs.x else None
    dx = dy.new_empty(m, k) if needs.x else None
    dlora_a = torch.zeros(r, k, dtype=acc, device=dy.device) if needs.lora_a else None
    dlora_b = torch.zeros(n, r, dtype=acc, device=dy.device) if needs.lora_b else None
    dbias = torch.zeros(n, dtype=acc, device=dy.device) if needs.bias else None
    for rows in row_chunks(m, max(n, k)):
        dy_rows = dy2[rows].to(acc)
        ds = scale * (dy_rows @ lora_b)  # [rows, N] @ [N, R] -> [rows, R]
        if dx is not None and w is not None:
            dx[rows] = dy_rows @ w + drop(ds @ lora_a, rows, adapter)  # [rows, N] @ [N, K] + [rows, R] @ [R, K]
        if dlora_a is not None and x is not None:
            dlora_a += ds.T @ drop(as_matrix(x)[rows].to(acc), rows, adapter)  # [R, rows] @ [rows, K] -> [R, K]
        if dlora_b is not None and s is not None:
            dlora_b += scale * (dy_rows.T @ as_matrix(s)[rows])  # [N, rows] @ [rows, R] -> [N, R]
        if dbias is not None:
            dbias += dy_rows.sum(0)
    return Grads(
        None if dx is None else as_output(dx, (*dy.shape[:-1], k)),
        None if dlora_a is None else dlora_a.to(adapter.lora_a.dtype),
        None if dlora_b is None else dlora_b.to(adapter.lora_b.dtype),
        None if dbias is None else dbias.to(dy.dtype),
    )


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
