"""Linear layer over a dense frozen weight on the CPU: csrc/cpu/gemm where torch has no fast product, else torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from lora_ops.quant import native_abi
from lora_ops.quant.frozen import FrozenTensor, declines_format
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import as_output


def frozen_linear(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    x2, w = native_abi.as_rows(x), native_abi.weight_view(weight)
    if w is None:
        y = linear(x2, weight, bias)
    else:
        y = x2.new_empty(x2.shape[0], weight.shape[0])
        native_abi.linear(w, x2, None if bias is None else bias.contiguous(), y)
    return y if x.dim() == 2 else as_output(y, (*x.shape[:-1], weight.shape[0]))


def frozen_linear_dx(*, dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., N], weight [N, K] -> dX [..., K]."""
    dy2, w = native_abi.as_rows(dy), native_abi.weight_view(weight)
    if w is None:
        dx = dy2 @ weight
    else:
        dx = dy2.new_empty(dy2.shape[0], weight.shape[1])
        native_abi.linear_dx(w, dy2, dx)
    return dx if dy.dim() == 2 else as_output(dx, (*dy.shape[:-1], weight.shape[1]))


def declines(op: str, lead: Tensor, *, weight: Tensor | FrozenTensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if 0 in weight.shape:
        return f"native kernels have no weights of shape {tuple(weight.shape)}"
    return declines_format(weight, backend="native") or native.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"frozen_linear": frozen_linear, "frozen_linear_dx": frozen_linear_dx}
