"""The dropout mask: known answers of Philox 4×32-10, an independent numpy version, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ops.kernels.philox import dropout_mask, keep_scale, threshold
from lora_ops.kernels.philox.reference import philox_4x32

# Counter, key, output: the known-answer tests that Salmon et al. publish with Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4×32-10 in uint64 arithmetic, written from the paper: counter uint64 [..., 4] -> words uint64 [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=-1)


def numpy_mask(rows: slice, k: int, p: float, seed: int, offset: int) -> np.ndarray:
    """Element by element: the lane of (m, k) is half k % 2 of word k % 8 // 2 of counter (k // 8, m, offset, 0)."""
    m, col = np.meshgrid(np.arange(rows.start, rows.stop), np.arange(k), indexing="ij")
    counter = np.stack([col // 8, m, np.full_like(m, offset), np.zeros_like(m)], axis=-1)
    words = numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    word = np.take_along_axis(words, (col % 8 // 2)[..., None], axis=-1)[..., 0]
    lane = word >> (16 * (col % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    return lane >= threshold(p)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    seed = torch.tensor(key[1] << 32 | key[0] if key[1] < 2**31 else (key[1] << 32 | key[0]) - 2**64)
    words = philox_4x32(*(torch.tensor([c]) for c in counter), seed)
    assert tuple(int(w) for w in words) == expected
    assert tuple(numpy_philox(np.array(counter, dtype=np.uint64), key).tolist()) == expected


@given(
    begin=st.integers(0, 2**31),
    n_rows=st.integers(0, 9),
    k=st.integers(1, 40),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 5),
)
def test_mask_is_the_independent_one(begin: int, n_rows: int, k: int, p: float, seed: int, offset: int) -> None:
    rows = slice(begin, begin + n_rows)
    mask = dropout_mask(rows, k, p, torch.tensor(seed), offset)
    assert mask.shape == (n_rows, k)
    assert np.array_equal(mask.numpy(), numpy_mask(rows, k, p, seed, offset))


def test_chunks_make_the_whole() -> None:
    seed = torch.tensor(3)
    whole = dropout_mask(slice(0, 50), 33, 0.3, seed)
    assert torch.equal(torch.cat([dropout_mask(slice(i, i + 10), 33, 0.3, seed) for i in range(0, 50, 10)]), whole)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_statistics(p: float) -> None:
    """The share of kept elements, in all and by lane, lies within five standard deviations; seeds are independent."""
    n = 2000 * 512
    mask = dropout_mask(slice(0, 2000), 512, p, torch.tensor(7)).double()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(mask.mean() - (1 - p)) <= 5 * sigma + 2**-17
    by_lane = mask.view(2000, 64, 8).mean(dim=(0, 1))
    assert float((by_lane - (1 - p)).abs().max()) <= 5 * sigma * 8**0.5 + 2**-17
    other = dropout_mask(slice(0, 2000), 512, p, torch.tensor(8)).double()
    covariance = ((mask - mask.mean()) * (other - other.mean())).mean()
    assert abs(covariance) <= 5 * p * (1 - p) / n**0.5 + 1e-12


def test_keep_scale_makes_the_mean_exact() -> None:
    for p in (0.0, 1e-6, 0.05, 0.1, 0.5, 0.999):
        assert keep_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1, abs=1e-15)
    assert keep_scale(1.0) == 0.0
