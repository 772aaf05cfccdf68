"""8-bit blockwise codes in C++ on the CPU: csrc/cpu/blockwise8.inl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native


def quantize_blockwise8(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize x to codes uint8 of x.shape and absmax fp32 [ceil(n / block_size)]."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32)
    native.blockwise8_quantize(x, block_size, dynamic_map(signed), codes, absmax)
    return codes, absmax


def dequantize_blockwise8(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """Decode: map[code] · absmax of its block, float32 of codes.shape."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32)
    native.blockwise8_dequantize(codes, absmax, block_size, dynamic_map(signed), out)
    return out


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return native.declines(lead.device, torch.float32)


IMPLS: dict[str, Callable] = {
    "quantize_blockwise8": quantize_blockwise8,
    "dequantize_blockwise8": dequantize_blockwise8,
}
