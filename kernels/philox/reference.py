"""Counter-based dropout masks in plain PyTorch; every backend draws the same bits.

The mask is a pure function of (seed, offset, row m, column k). Philox 4×32-10 with key = seed and counter =
(k // 8, m, offset, 0) yields four 32-bit words, which are read as eight 16-bit lanes, the low half of a word first.
Lane k % 8 belongs to element (m, k), which is kept if its lane is at least `threshold(p)`.

Eight neighbours of a row share one counter, because a thread loads eight 16-bit values at once; 16-bit lanes, because
they halve the integer work and resolve p to 1.5e-5.

Source: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al. 2011), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 8  # elements a counter serves
_MASK32 = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Lanes below it are dropped: p in units of 2^-16."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by so that the mean is exact, 1 / (1 - threshold(p) / 65536); 0 if none is."""
    kept = 65536 - threshold(p)
    return 65536 / kept if kept else 0.0


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · b for b in [0, 2^32), in int64 (whose wrap-around keeps all 64 bits)."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4×32-10 of the counters (c0, c1, c2, c3) with key `seed`; all int64 that hold 32-bit words."""
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + WEYL[0]) & _MASK32, (key1 + WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_mask(rows: slice, k: int, p: float, seed: Tensor, offset: int = 0) -> Tensor:
    """Which elements of rows [rows.start, rows.stop) of an [M, K] tensor are kept.

    Args:
        rows: the rows, so that a mask can be drawn in chunks.
        k: columns of the tensor.
        p: probability to drop, applied as round(p · 2^16) / 2^16.
        seed: int64 0-d tensor; the mask is drawn on its device.
        offset: separates masks of one seed, such as those of several projections of one input.

    Returns:
        bool [rows.stop - rows.start, K].
    """
    device = seed.device
    c0 = torch.arange(-(-k // LANES), device=device)[None, :]
    c1 = torch.arange(rows.start, rows.stop, device=device)[:, None]
    c0, c1 = torch.broadcast_tensors(c0, c1)
    words = philox_4x32(c0, c1, torch.full_like(c0, offset), torch.zeros_like(c0), seed)
    lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)  # [rows, ceil(K / 8), 8]
    return (lanes >= threshold(p)).flatten(1)[:, :k]
