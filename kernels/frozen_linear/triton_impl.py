"""Linear layer over a dense frozen weight on a GPU: cuBLAS, through torch, as all dense products here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from lora_ops.quant.frozen import FrozenTensor, declines_format
from lora_ops.quant.nf4.linear.reference import as_matrix
from lora_ops.runtime import triton_launch
from lora_ops.runtime.dispatch import as_output


def frozen_linear(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return as_output(linear(as_matrix(x), weight, bias), (*x.shape[:-1], weight.shape[0]))


def frozen_linear_dx(*, dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., N], weight [N, K] -> dX [..., K]."""
    return as_output(as_matrix(dy) @ weight, (*dy.shape[:-1], weight.shape[1]))


def declines(op: str, lead: Tensor, *, weight: Tensor | FrozenTensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return declines_format(weight, backend="triton") or triton_launch.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"frozen_linear": frozen_linear, "frozen_linear_dx": frozen_linear_dx}
