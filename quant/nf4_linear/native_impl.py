"""Linear layer over an NF4 weight on the CPU: W decoded by the native codec into a temporary, then torch's own GEMM.

W is decoded in the activations' dtype; the GEMM accumulates in float32 and rounds once. The temporary lives for one
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4_codec import native_impl as codec


def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    return linear(x, codec.dequantize_nf4(q, x.dtype), bias)


def nf4_linear_dx(dy: Tensor, q: NF4Tensor) -> Tensor:
    """dy [..., N], q (N, K) -> dX [..., K]."""
    return dy @ codec.dequantize_nf4(q, dy.dtype)


def declines(op: str, lead: Tensor, q: NF4Tensor, *args: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return codec.declines("dequantize_nf4", q, lead.dtype)


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear, "nf4_linear_dx": nf4_linear_dx}
