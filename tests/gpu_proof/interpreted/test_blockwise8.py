"""The 8-bit codes' kernels: bit-equal to the reference, within their tensors, in the least bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_ops
from lora_ops.functional import dequantize_blockwise8, quantize_blockwise8
from lora_ops.quant.blockwise8.triton_impl import BLOCK_SIZES
from tests.gpu_proof.interpreter import count_traffic
from tests.quant.test_nf4_codec import bits, weights

sizes = st.one_of(st.integers(0, 300), st.sampled_from([2047, 2048, 4097, 8193]), st.integers(0, 9000))


@given(n=sizes, block_size=st.sampled_from(BLOCK_SIZES), signed=st.booleans(), seed=st.integers(0, 2**31))
def test_bit_equal(n: int, block_size: int, signed: bool, seed: int) -> None:
    x = weights((n,), torch.float32, seed)
    if not signed:
        x = x.abs()
    codes, absmax = quantize_blockwise8(x, block_size=block_size, signed=signed)
    values = dequantize_blockwise8(codes, absmax, block_size=block_size, signed=signed)
    with lora_ops.use_backend("reference"):
        expected_codes, expected_absmax = quantize_blockwise8(x, block_size=block_size, signed=signed)
        expected = dequantize_blockwise8(codes, absmax, block_size=block_size, signed=signed)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(bits(absmax), bits(expected_absmax))
    assert torch.equal(bits(values), bits(expected))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_whole_blocks_and_part_of_a_tile(block_size: int) -> None:
    """Where a block ends with the tensor and the tile does not, a mask one block too wide leaves absmax."""
    x = torch.randn(3 * block_size)
    codes, absmax = quantize_blockwise8(x, block_size=block_size)
    values = dequantize_blockwise8(codes, absmax, block_size=block_size)
    with lora_ops.use_backend("reference"):
        expected_codes, expected_absmax = quantize_blockwise8(x, block_size=block_size)
        expected = dequantize_blockwise8(codes, absmax, block_size=block_size)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(values, expected)


def test_non_contiguous() -> None:
    x = torch.randn(96, 64)
    assert torch.equal(quantize_blockwise8(x.T)[0], quantize_blockwise8(x.T.contiguous())[0])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_nonfinite_raises(bad: float) -> None:
    x = torch.zeros(300)
    x[299] = bad
    with pytest.raises(ValueError, match="x: expected finite values"):
        quantize_blockwise8(x)


def test_declines_odd_block_sizes() -> None:
    with pytest.raises(lora_ops.BackendError, match="block sizes"):
        quantize_blockwise8(torch.randn(10), block_size=48)


@pytest.mark.parametrize("n", [1 << 15, 40001])
def test_traffic(n: int) -> None:
    x = torch.randn(n)
    with count_traffic() as t:
        codes, absmax = torch.ops.lora_ops.quantize_blockwise8(x, 256, True)
    assert t.launches == 1
    assert t.total <= 1.05 * (x.nbytes + codes.nbytes + absmax.nbytes), t
    with count_traffic() as t:
        out = dequantize_blockwise8(codes, absmax)
    assert t.launches == 1
    assert t.total <= 1.05 * (codes.nbytes + absmax.nbytes + out.nbytes), t
