"""The checksum of pages and checkpoints: one definition, and nothing small slips through."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ops.paging.checksum import checksum, portable_checksum
from lora_ops.runtime import native

EMPTY, RAMP = 0xBCCE5CDE79263CDE, 0x4EB8A3576AC0FEAC
LENGTHS = (0, 1, 7, 8, 9, 4095, 4096, 4097, 8192, 20_001)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else ["native"])
def test_native_equals_numpy(isa: str, n: int) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    view = memoryview(random.Random(n).randbytes(n))
    with native.force_isa(isa):
        assert checksum(view) == portable_checksum(view)


def test_values_stay() -> None:
    """Files of one version are read by the next."""
    assert checksum(memoryview(b"")) == EMPTY
    assert checksum(memoryview(bytes(range(256)) * 20)) == RAMP


@settings(max_examples=200)
@given(
    n=st.sampled_from(LENGTHS[1:]),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(("bit", "two bits", "swap", "tail")),
)
def test_damage_is_seen(n: int, seed: int, kind: str) -> None:
    """A bit, the same bit of two words (which sums and products of words miss), two words swapped, zeros appended."""
    draw = random.Random(seed)
    whole = draw.randbytes(n)
    broken = bytearray(whole)
    at = draw.randrange(n)
    if kind == "swap":
        i, j = (8 * draw.randrange(-(-n // 8)) for _ in range(2))
        broken[i : i + 8], broken[j : j + 8] = whole[j : j + 8], whole[i : i + 8]
    elif kind == "tail":
        broken += bytes(draw.randrange(1, 9))
    else:
        bit = 1 << draw.randrange(8)
        broken[at] ^= bit
        if kind == "two bits" and n > 8:
            broken[(at + 8 * draw.randrange(1, -(-n // 8))) % n] ^= bit
    assert (checksum(memoryview(broken)) == checksum(memoryview(whole))) == (bytes(broken) == whole)
