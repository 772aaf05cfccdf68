"""How parameters are cut into extents: every element has a place, in blocks, and no two places overlap."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ops.optim.layout import BLOCK_SIZE, Packer, effective_bits, state_bytes, views

EXTENTS = st.sampled_from([4096, 8192, 12288, 65536])


@given(extent=EXTENTS, numels=st.lists(st.integers(0, 20_000), max_size=12), bits=st.lists(st.sampled_from([8, 32])))
def test_places(extent: int, numels: list[int], bits: list[int]) -> None:
    """Whatever sizes stand before it in an extent, in 32 and 8 bits mixed."""
    packer = Packer(extent)
    used: dict[int, int] = {}
    for i, numel in enumerate(numels):
        width = effective_bits(numel, bits[i % len(bits)] if bits else 8)
        first = 0
        for s in packer.place(numel, width):
            assert (s.first, s.bits) == (first, width)
            assert s.n > 0
            assert s.offset >= used.get(s.extent, 0)
            used[s.extent] = s.offset + state_bytes(s.n, width)
            assert used[s.extent] <= extent
            first += s.n
            assert first == numel or s.n % BLOCK_SIZE == 0
        assert first == numel
    assert packer.n_extents == len(used)


@given(n=st.integers(1, 5000), bits=st.sampled_from([8, 32]))
def test_views_do_not_overlap_and_are_aligned(n: int, bits: int) -> None:
    buffer = torch.zeros(state_bytes(n, bits), dtype=torch.uint8)
    for i, t in enumerate(views(buffer, 0, n, bits).tensors().values(), 1):
        assert bool((t == 0).all())
        assert (t.data_ptr() - buffer.data_ptr()) % 64 == 0
        t.fill_(i)
