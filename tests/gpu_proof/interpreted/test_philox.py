"""The dropout mask drawn in registers: the same bits as the reference's, wherever a tile lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from lora_ops.kernels.philox import dropout_mask, threshold
from lora_ops.kernels.philox.triton_impl import keep_mask
from lora_ops.runtime.triton_launch import launch


@triton.jit
def _mask_kernel(
    out_ptr, seed_ptr, threshold, offset, first_row, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    rows = first_row + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    keep = keep_mask(tl.load(seed_ptr), rows, first, threshold, offset, BLOCK_M, BLOCK_K)
    inside = (rows < first_row + M)[:, None] & (columns < K)[None, :]
    tl.store(out_ptr + (rows - first_row)[:, None] * K + columns[None, :], keep.to(tl.int8), inside)


@given(
    m=st.integers(1, 40),
    k=st.integers(1, 200),
    first_row=st.sampled_from([0, 1, 8191, 2**31 - 100]),
    p=st.sampled_from([0.0, 2**-16, 0.1, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.sampled_from([0, 1, 7, 2**31 - 1]),
    block=st.sampled_from([(16, 16), (32, 32), (16, 128)]),
)
def test_bits(m: int, k: int, first_row: int, p: float, seed: int, offset: int, block: tuple[int, int]) -> None:
    out = torch.full((m, k), -1, dtype=torch.int8)
    seed_tensor = torch.tensor(seed)
    block_m, block_k = block
    launch(
        _mask_kernel, (triton.cdiv(m, block_m), triton.cdiv(k, block_k)),
        out, seed_tensor, threshold(p), offset, first_row, m, k, BLOCK_M=block_m, BLOCK_K=block_k,
    )  # fmt: skip
    expected = dropout_mask(slice(first_row, first_row + m), k, p, seed_tensor, offset)
    assert torch.equal(out, expected.to(torch.int8))
