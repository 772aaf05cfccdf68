"""The dropout mask of reference.py, drawn in registers; to be called from other kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from lora_ops.kernels.philox import reference

LANES = tl.constexpr(reference.LANES)


@triton.jit
def keep_mask(seed, rows, first_column, threshold, offset, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep[m, k] = lane (k % 8) of Philox 4×32-10(key = seed, counter = (k // 8, m, offset, 0)) >= threshold.

    Eight neighbours along K share one Philox, which costs about 70 integer instructions, 9 an element.

    Args:
        seed: int64 scalar, loaded by the caller.
        rows: [BLOCK_M] row numbers in the whole tensor.
        first_column: of the tile, a multiple of 8.
        threshold: p in units of 2^-16.
        offset: separates masks of one seed.

    Returns:
        int1 [BLOCK_M, BLOCK_K].
    """
    groups = first_column // LANES + tl.arange(0, BLOCK_K // LANES)
    zeros = tl.zeros([BLOCK_M, BLOCK_K // LANES], dtype=tl.uint32)
    c0 = zeros + groups[None, :].to(tl.uint32)
    c1 = zeros + rows[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zeros + tl.cast(offset, tl.uint32), zeros)
    # join appends the fastest axis: the outer pair (w0 | w2) is the high bit of the word's number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_K // 2)
    limit = tl.cast(threshold, tl.uint32)
    halves = tl.join((words & 0xFFFF) >= limit, (words >> 16) >= limit)  # the low half is the even lane
    return halves.reshape(BLOCK_M, BLOCK_K)
