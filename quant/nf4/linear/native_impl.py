"""Linear layer over an NF4 weight on the CPU, in C++: csrc/cpu/gemm. W is decoded a panel at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_ops.quant import native_abi
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import as_output


def nf4_linear(*, x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    x2 = native_abi.as_rows(x)
    if x.dim() == 2:
        y = y2 = x2.new_empty(x2.shape[0], q.shape[0])
    else:  # of its own shape from the start, and so no view: see as_output
        y = x.new_empty(*x.shape[:-1], q.shape[0])
        y2 = y.view(x2.shape[0], q.shape[0])
    native_abi.linear(native_abi.nf4_view(q), x2, None if bias is None else bias.contiguous(), y2)
    return y


def nf4_linear_dx(*, dy: Tensor, q: NF4Tensor) -> Tensor:
    """dy [..., N], q (N, K) -> dX [..., K]."""
    dy2 = native_abi.as_rows(dy)
    dx = dy2.new_empty(dy2.shape[0], q.shape[1])
    native_abi.linear_dx(native_abi.nf4_view(q), dy2, dx)
    return dx if dy.dim() == 2 else as_output(dx, (*dy.shape[:-1], q.shape[1]))


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return native.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear, "nf4_linear_dx": nf4_linear_dx}
