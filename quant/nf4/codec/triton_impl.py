"""The NF4 codec in Triton, bit-equal to the reference: IEEE division, one rounding, no fused multiply-add.

Both kernels stream: one program owns TILE consecutive elements and addresses them from a 64-bit start, so a tensor may
exceed 2^31 elements while offsets within the tile stay 32-bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.quant.blockwise8.triton_impl import map_on
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, nf4_thresholds
from lora_ops.quant.nf4.triton_decode import decode_nf4
from lora_ops.quant.stream_triton import load_ragged, scale_blocks, store_ragged
from lora_ops.runtime import triton_launch
from lora_ops.runtime.triton_launch import launch

# 16 elements a thread: two 16-byte loads of 16-bit values. With 32, sm_80 spills.
QUANTIZE_TILE = 2048
QUANTIZE_ELEMENTS_A_THREAD = 16
# 32 elements a thread: four 16-byte stores of 16-bit values. 64 would load the permutes' table words half as often, but
# takes 96 registers instead of 56 on sm_90, and those loads use the multiply pipe, which has nothing else to do.
# A tile never crosses one of the 256-block groups of double quantization, which have at least 8192 elements.
DEQUANTIZE_TILE = 4096
DEQUANTIZE_WARPS = 4
# Rows of a decode tile share one absmax; larger blocks are several rows, so block sizes need no kernels of their own.
MAX_ROW = 64

_T = tl.constexpr(tuple(nf4_thresholds().tolist()))
_GROUP = tl.constexpr(NESTED_BLOCK_SIZE)


@triton.jit
def _encode(v):
    """Number of thresholds that v exceeds, by bisection: 4 compares and 11 selects against 15 compares and 15 adds."""
    c3 = v > _T[7]
    c2 = v > tl.where(c3, _T[11], _T[3])
    c1 = v > tl.where(c3, tl.where(c2, _T[13], _T[9]), tl.where(c2, _T[5], _T[1]))
    low = tl.where(c2, tl.where(c1, _T[6], _T[4]), tl.where(c1, _T[2], _T[0]))
    high = tl.where(c2, tl.where(c1, _T[14], _T[12]), tl.where(c1, _T[10], _T[8]))
    c0 = v > tl.where(c3, high, low)
    return c3.to(tl.int32) * 8 + c2.to(tl.int32) * 4 + c1.to(tl.int32) * 2 + c0.to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _quantize_nf4_kernel(w_ptr, packed_ptr, absmax_ptr, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """w [n] -> packed [(n + 1) // 2], absmax [ceil(n / BLOCK)]; one program takes ROWS blocks."""
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = tl.minimum(n - start, ROWS * BLOCK).to(tl.int32)
    row = tl.arange(0, ROWS)
    e = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    w = load_ragged(w_ptr + start, e, left).to(tl.float32)

    v, absmax, clamped, partial = scale_blocks(w, left)
    absmax = tl.where(partial, clamped, absmax)  # as the format stores it for a partial block, and only there
    tl.store(absmax_ptr + start // BLOCK + row, absmax, mask=row * BLOCK < left)

    even, odd = tl.split(tl.reshape(_encode(v), [ROWS, BLOCK // 2, 2]))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    store_ragged(packed_ptr + start // 2, byte, (even * 16 + odd).to(tl.uint8), (left + 1) // 2)


@triton.jit(do_not_specialize=["n", "shift"])
def _dequantize_nf4_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    map_table_ptr,
    out_ptr,
    n,
    shift,
    NESTED: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """packed [(n + 1) // 2] -> out [n]; a block is 2^shift rows of ROW elements."""
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - start, TILE).to(tl.int32)
    row = tl.arange(0, TILE // ROW)
    byte = row[:, None] * (ROW // 2) + tl.arange(0, ROW // 2)[None, :]  # [TILE / ROW, ROW / 2]
    # A thread that holds 4 bytes writes 8 values, 16 bytes in 16 bits: nothing has to change hands in shared memory.
    packed = load_ragged(packed_ptr + start // 2, tl.max_contiguous(byte, [1, 4]), (left + 1) // 2)

    first = (start // ROW) >> shift
    inside = row * ROW < left
    block = row >> shift
    scale = tl.load(absmax_ptr + first + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + first // _GROUP)
        scale = tl.load(map_table_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)

    even, odd = decode_nf4(packed)
    value = tl.join(even * scale[:, None], odd * scale[:, None]).to(out_ptr.dtype.element_ty)
    e = row[:, None] * ROW + tl.arange(0, ROW)[None, :]
    store_ragged(out_ptr + start, e, tl.reshape(value, [TILE // ROW, ROW]), left)


def _launch_quantize(w: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    n, rows = w.numel(), max(1, QUANTIZE_TILE // block_size)
    tile = rows * block_size
    launch(
        _quantize_nf4_kernel, (triton.cdiv(n, tile),), w, packed, absmax, n,
        BLOCK=block_size, ROWS=rows, num_warps=tile // (32 * QUANTIZE_ELEMENTS_A_THREAD), enable_fp_fusion=False,
    )  # fmt: skip


def quantize_nf4(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize w to packed uint8 [(n + 1) // 2, 1] and absmax fp32 [ceil(n / block_size)]."""
    w = w.contiguous()
    n = w.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    _launch_quantize(w, block_size, packed, absmax)
    # Waits for the kernel, once a weight: inf and NaN reach the maximum, so no flag has to be raised by atomics.
    if w.device.type != "meta" and not bool(torch.isfinite(absmax).all()):
        raise ValueError("w: expected finite values, got inf or NaN")
    return packed, absmax


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """NF4_CODE[code] · absmax in float32, rounded to `dtype`, of q.shape."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_nf4_out(q, out)
    return out


def dequantize_nf4_out(q: NF4Tensor, out: Tensor) -> None:
    """The same, written into `out`. The kernel writes in order: into a transposed `out` it goes by a dense copy."""
    if not out.is_contiguous():
        out.copy_(dequantize_nf4(q, out.dtype))
        return
    row = min(q.block_size, MAX_ROW)
    n = q.numel()
    nested = (q.nested_absmax, q.nested_offset, map_on(q.device, signed=True)) if q.nested else (None, None, None)
    launch(
        _dequantize_nf4_kernel, (triton.cdiv(n, DEQUANTIZE_TILE),), q.packed, q.absmax, *nested, out, n,
        int(math.log2(q.block_size // row)),
        NESTED=q.nested, ROW=row, TILE=DEQUANTIZE_TILE, num_warps=DEQUANTIZE_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def declines(
    op: str, lead: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None, **operands: Any
) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return triton_launch.declines(lead.device, dtype or (lead if out is None else out).dtype)


IMPLS: dict[str, Callable] = {
    "quantize_nf4": quantize_nf4,
    "dequantize_nf4": dequantize_nf4,
    "dequantize_nf4_out": dequantize_nf4_out,
}
