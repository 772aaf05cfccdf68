"""8-bit blockwise codes in C++ on the CPU: csrc/cpu/blockwise8."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native

_SIZES = c_int64, c_int64  # n, block_size
_QUANTIZE = native.Function("blockwise8_quantize", c_void_p, *_SIZES, *(c_void_p,) * 3, c_int)
_DEQUANTIZE = native.Function("blockwise8_dequantize", c_void_p, c_void_p, *_SIZES, c_void_p, c_void_p, c_int)


def quantize(x: Tensor, block_size: int, code_map: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Quantize x fp32 [n] into codes uint8 [n] and absmax fp32 [ceil(n / block_size)]; code_map fp32 [256] ascends."""
    _QUANTIZE(
        x.data_ptr(),
        x.numel(),
        block_size,
        code_map.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )


def dequantize(codes: Tensor, absmax: Tensor, block_size: int, code_map: Tensor, out: Tensor) -> None:
    """Decode codes uint8 [n] with absmax fp32 [ceil(n / block_size)] into out fp32 [n]."""
    _DEQUANTIZE(
        codes.data_ptr(),
        absmax.data_ptr(),
        codes.numel(),
        block_size,
        code_map.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def quantize_blockwise8(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize x to codes uint8 of x.shape and absmax fp32 [ceil(n / block_size)]."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32)
    quantize(x, block_size, dynamic_map(signed), codes, absmax)
    return codes, absmax


def dequantize_blockwise8(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """Decode: map[code] · absmax of its block, float32 of codes.shape."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32)
    dequantize(codes, absmax, block_size, dynamic_map(signed), out)
    return out


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return native.declines(lead.device, torch.float32)


IMPLS: dict[str, Callable] = {
    "quantize_blockwise8": quantize_blockwise8,
    "dequantize_blockwise8": dequantize_blockwise8,
}
