"""Linear layer over a frozen weight in plain PyTorch: y = x Wᵀ + b and dX = dY · W, accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lora_ops.kernels.lora_linear.reference import widened
from lora_ops.quant.frozen import FrozenTensor
from lora_ops.quant.nf4.linear.reference import accumulate_dtype, as_matrix, row_chunks
from lora_ops.runtime.dispatch import as_output


def frozen_linear(*, x: Tensor, weight: Tensor | FrozenTensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    (n, k), acc = weight.shape, accumulate_dtype(x.dtype)
    w, x2 = widened(weight, x.dtype), as_matrix(x)
    y = x.new_empty(x2.shape[0], n)
    for rows in row_chunks(x2.shape[0], max(n, k)):
        y_rows = x2[rows].to(acc) @ w.T  # [rows, K] @ [K, N] -> [rows, N]
        y[rows] = y_rows if bias is None else y_rows + bias.to(acc)
    return as_output(y, (*x.shape[:-1], n))


def frozen_linear_dx(*, dy: Tensor, weight: Tensor | FrozenTensor) -> Tensor:
    """dy [..., N], weight [N, K] -> dX [..., K]."""
    (n, k), acc = weight.shape, accumulate_dtype(dy.dtype)
    w, dy2 = widened(weight, dy.dtype), as_matrix(dy)
    dx = dy.new_empty(dy2.shape[0], k)
    for rows in row_chunks(dy2.shape[0], max(n, k)):
        dx[rows] = dy2[rows].to(acc) @ w  # [rows, N] @ [N, K] -> [rows, K]
    return as_output(dx, (*dy.shape[:-1], k))


IMPLS: dict[str, Callable] = {"frozen_linear": frozen_linear, "frozen_linear_dx": frozen_linear_dx}
