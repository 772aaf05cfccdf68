"""Ragged tiles at full width, and the scaling of quantization blocks: device functions of the codecs' kernels.

A mask `e < left` with a `left` that the compiler knows nothing of splits every access into single elements (seen on
sm_90: 32 two-byte stores in place of 4 of 16 bytes). So the multiple of 16 below `left` is accessed under a mask that
keeps 16 neighbours together, and only a tile that ends elsewhere, the last one, takes a second access for the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_ops.quant.blockwise8.reference import MIN_ABSMAX

_MIN_ABSMAX_BITS = tl.constexpr(int(torch.tensor(MIN_ABSMAX).view(torch.int32)))


@triton.jit
def load_ragged(ptr, e, left):
    """Elements `e` of the tile at `ptr`, of which the first `left` exist; 0 in place of the others."""
    even = left // 16 * 16
    value = tl.load(ptr + e, mask=e < even, other=0)
    if even != left:
        rest = tl.load(ptr + e, mask=(e >= even) & (e < left), other=0)
        value = tl.where(e < even, value, rest)
    return value


@triton.jit
def store_ragged(ptr, e, value, left):
    """Store `value` to elements `e` of the tile at `ptr`, of which the first `left` exist."""
    even = left // 16 * 16
    tl.store(ptr + e, value, mask=e < even)
    if even != left:
        tl.store(ptr + e, value, mask=(e >= even) & (e < left))


@triton.jit
def scale_blocks(x, left):
    """Scale quantization blocks to [-1, 1]: full blocks by the reciprocal of absmax, a partial one by division.

    Args:
        x: fp32 [ROWS, BLOCK], a block a row, 0 from element `left` of the tile on.

    Returns:
        v [ROWS, BLOCK]; absmax [ROWS], inf or NaN where a block holds one; absmax clamped from below; which rows are
        partial.
    """
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    # As integers, magnitudes order like floats and NaN comes out above inf instead of being ignored by max.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    clamped = tl.maximum(bits, _MIN_ABSMAX_BITS).to(tl.float32, bitcast=True)
    partial = (tl.arange(0, ROWS) + 1) * BLOCK > left
    v = x * tl.div_rn(tl.full([ROWS], 1.0, tl.float32), clamped)[:, None]
    if left % BLOCK != 0:  # in the tensor's last tile alone
        v = tl.where(partial[:, None], tl.div_rn(x, tl.broadcast_to(clamped[:, None], [ROWS, BLOCK])), v)
    return v, absmax, clamped, partial
