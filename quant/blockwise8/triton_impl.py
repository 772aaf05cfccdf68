"""8-bit blockwise codes in Triton, bit-equal to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map, dynamic_thresholds
from lora_ops.quant.stream_triton import load_ragged, scale_blocks, store_ragged
from lora_ops.runtime import triton_launch
from lora_ops.runtime.triton_launch import launch

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
TILE = 2048  # 16 elements a thread at 4 warps: four 16-byte loads or stores of fp32
ROW = 64  # elements of a decode tile's row, which share one absmax; larger blocks are several rows


@triton.jit(do_not_specialize=["n"])
def _quantize_blockwise8_kernel(
    x_ptr, codes_ptr, absmax_ptr, threshold_table_ptr, n, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """x [n] -> codes [n], absmax [ceil(n / BLOCK)]; one program takes ROWS blocks."""
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = tl.minimum(n - start, ROWS * BLOCK).to(tl.int32)
    row = tl.arange(0, ROWS)
    e = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    v, absmax, _, _ = scale_blocks(load_ragged(x_ptr + start, e, left), left)
    tl.store(absmax_ptr + start // BLOCK + row, absmax, mask=row * BLOCK < left)

    code = tl.zeros([ROWS, BLOCK], dtype=tl.int32)  # thresholds exceeded, by bisection of all 255
    for i in tl.static_range(8):
        code += tl.where(v > tl.load(threshold_table_ptr + code + ((128 >> i) - 1)), 128 >> i, 0)
    store_ragged(codes_ptr + start, e, code.to(tl.uint8), left)


@triton.jit(do_not_specialize=["n", "shift"])
def _dequantize_blockwise8_kernel(
    codes_ptr, absmax_ptr, map_table_ptr, out_ptr, n, shift, ROW: tl.constexpr, TILE: tl.constexpr
):
    """codes [n] -> out [n]; a block is 2^shift rows of ROW elements."""
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - start, TILE).to(tl.int32)
    row = tl.arange(0, TILE // ROW)
    e = row[:, None] * ROW + tl.arange(0, ROW)[None, :]  # [TILE / ROW, ROW]
    # 4 codes a thread become 16 bytes of fp32.
    code = load_ragged(codes_ptr + start, tl.max_contiguous(e, [1, 4]), left).to(tl.int32)
    scale = tl.load(absmax_ptr + (start // ROW >> shift) + (row >> shift), mask=row * ROW < left, other=0.0)
    store_ragged(out_ptr + start, e, tl.load(map_table_ptr + code) * scale[:, None], left)


@functools.cache
def map_on(device: torch.device, *, signed: bool) -> Tensor:
    """The 256 values of the dynamic map on `device`."""
    return dynamic_map(signed).to(device)


@functools.cache
def thresholds_on(device: torch.device, *, signed: bool) -> Tensor:
    """The 255 decision thresholds of the dynamic map on `device`."""
    return dynamic_thresholds(signed).to(device)


def quantize_blockwise8(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize x to codes uint8 of x.shape and absmax fp32 [ceil(n / block_size)]."""
    x = x.contiguous()
    n, rows = x.numel(), max(1, TILE // block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    launch(
        _quantize_blockwise8_kernel, (triton.cdiv(n, rows * block_size),),
        x, codes, absmax, thresholds_on(x.device, signed=signed), n,
        BLOCK=block_size, ROWS=rows, num_warps=rows * block_size // 512, enable_fp_fusion=False,
    )  # fmt: skip
    if x.device.type != "meta" and not bool(torch.isfinite(absmax).all()):
        raise ValueError("x: expected finite values, got inf or NaN")
    return codes, absmax


def dequantize_blockwise8(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """Decode: map[code] · absmax of its block, float32 of codes.shape."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    n = codes.numel()
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    launch(
        _dequantize_blockwise8_kernel, (triton.cdiv(n, TILE),),
        codes, absmax, map_on(codes.device, signed=signed), out, n, (block_size // ROW).bit_length() - 1,
        ROW=ROW, TILE=TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def declines(op: str, lead: Tensor, *, block_size: int, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if block_size not in BLOCK_SIZES:
        return f"triton kernels have block sizes {BLOCK_SIZES}, not {block_size}"
    return triton_launch.declines(lead.device, torch.float32)


IMPLS: dict[str, Callable] = {
    "quantize_blockwise8": quantize_blockwise8,
    "dequantize_blockwise8": dequantize_blockwise8,
}
