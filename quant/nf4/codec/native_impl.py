"""The NF4 codec in C++ on the CPU: csrc/cpu/nf4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4 import native_abi as nf4_abi
from lora_ops.runtime import native


def quantize_nf4(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize w to packed uint8 [(n + 1) // 2, 1] and absmax fp32 [ceil(n / block_size)]."""
    n = w.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    if w.dim() == 2 and not w.is_contiguous() and w.t().is_contiguous():
        nf4_abi.quantize_transposed(w.t(), block_size, packed, absmax)
    else:
        nf4_abi.quantize(w.contiguous(), block_size, packed, absmax)
    return packed, absmax


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """NF4_CODE[code] · absmax in float32, rounded to `dtype`, of q.shape; in `out` if given: it or its transpose is
    contiguous."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype)
    if out.is_contiguous():
        nf4_abi.dequantize(nf4_abi.weight_of(q), 0, out.numel(), out)
    else:
        nf4_abi.dequantize_transposed(nf4_abi.weight_of(q), out.t())
    return out


def dequantize_nf4_out(q: NF4Tensor, out: Tensor) -> None:
    """The same, written into `out`."""
    dequantize_nf4(q, out.dtype, out)


def declines(
    op: str, lead: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None, **operands: Any
) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return native.declines(lead.device, dtype or (lead if out is None else out).dtype)


IMPLS: dict[str, Callable] = {
    "quantize_nf4": quantize_nf4,
    "dequantize_nf4": dequantize_nf4,
    "dequantize_nf4_out": dequantize_nf4_out,
}
