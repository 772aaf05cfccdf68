"""Ragged tiles at full width: device functions for kernels that stream flat tensors.

A mask `e < left` with a `left` that the compiler knows nothing of splits every access into single elements (seen on
sm_90: 32 two-byte stores in place of 4 of 16 bytes). So the multiple of 16 below `left` is accessed under a mask that
keeps 16 neighbours together, and only a tile that ends elsewhere, the last one, takes a second access for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
