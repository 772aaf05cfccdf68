"""The NF4 codec's kernels: bit-equal to the reference, within their tensors, in the least bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ops
from lora_ops.functional import dequantize_nf4, quantize_nf4
from lora_ops.quant.nf4 import BLOCK_SIZES, NF4Tensor, nf4_thresholds
from tests.gpu_proof.interpreter import count_traffic
from tests.quant.test_nf4_codec import DTYPES, bits, truth, weights

# Around the tiles of 2048, 4096 and the 16 elements of an access, and anything else.
sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([2047, 2048, 4095, 4096, 4097, 8193, 12304]), st.integers(0, 9000)
)


def reference(w: torch.Tensor, block_size: int, double_quant: bool = False) -> NF4Tensor:
    with lora_ops.use_backend("reference"):
        return quantize_nf4(w, block_size=block_size, double_quant=double_quant)


@given(n=sizes, dtype=st.sampled_from(DTYPES), block_size=st.sampled_from(BLOCK_SIZES), seed=st.integers(0, 2**31))
def test_quantize(n: int, dtype: torch.dtype, block_size: int, seed: int) -> None:
    w = weights((n,), dtype, seed)
    q, expected = quantize_nf4(w, block_size=block_size), reference(w, block_size)
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(bits(q.absmax), bits(expected.absmax))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_whole_blocks_and_part_of_a_tile(block_size: int) -> None:
    """Where a block ends with the tensor and the tile does not, a mask one block too wide leaves absmax."""
    w = torch.randn(3 * block_size)
    q, expected = quantize_nf4(w, block_size=block_size), reference(w, block_size)
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(q.absmax, expected.absmax)


def at_thresholds(thresholds: torch.Tensor, absmax: float) -> torch.Tensor:
    """absmax, and what it scales to each threshold or to a neighbour of one: there the kind of division shows."""
    at = thresholds * absmax
    around = (at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1))
    return torch.cat([torch.tensor([absmax]), *around])


def test_full_blocks_take_the_reciprocal_and_partial_ones_divide() -> None:
    g = torch.Generator().manual_seed(0)
    differ = 0
    for absmax in (0.5 + torch.rand(20, generator=g)).tolist():
        part = at_thresholds(nf4_thresholds(), absmax)
        w = torch.cat([part, torch.zeros(64 - part.numel()), part])
        assert torch.equal(quantize_nf4(w).packed, reference(w, 64).packed)
        ways = part / part[0], part * (1 / part[0])
        differ += int((torch.bucketize(ways[0], nf4_thresholds()) != torch.bucketize(ways[1], nf4_thresholds())).sum())
    assert differ > 20  # so many codes depend on it


@given(
    n=sizes,
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_dequantize(n: int, dtype: torch.dtype, block_size: int, double_quant: bool, seed: int) -> None:
    q = reference(weights((n,), torch.float32, seed), block_size, double_quant)
    expected = truth(q).to(dtype)
    assert torch.equal(bits(dequantize_nf4(q, dtype=dtype)), bits(expected))
    guarded = torch.full((n + 64,), torch.nan, dtype=dtype)  # NaN before and behind must stay, none inside may
    out = guarded[32 : 32 + n]
    dequantize_nf4(q, out=out)
    assert torch.equal(bits(out), bits(expected))
    assert guarded[:32].isnan().all()
    assert guarded[32 + n :].isnan().all()


def test_dequantize_into_a_transpose() -> None:
    q = reference(weights((40, 70), torch.float32, 0), 64, True)
    buffer = torch.full((70, 40), torch.nan)
    dequantize_nf4(q, out=buffer.t())
    assert torch.equal(bits(buffer), bits(truth(q).t()))


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_groups_of_double_quantization(block_size: int) -> None:
    """More than one group of 256 blocks, the last one cut off: each program takes the scale of its own."""
    w = torch.randn(3, 256 * block_size) * torch.tensor([[1.0], [20.0], [400.0]])
    q = reference(w.view(-1)[: -256 * block_size // 3], block_size, double_quant=True)
    assert q.nested_absmax is not None
    assert len(q.nested_absmax.unique()) == 3
    assert torch.equal(bits(dequantize_nf4(q)), bits(truth(q)))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_every_code_and_extreme_scale() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).view(-1, 1)
    absmax = torch.tensor([1e-45, 1e-38, 6e-8, 65504, 65520, 3.4e38, torch.inf, torch.nan]).repeat(8)
    q = NF4Tensor(packed, absmax, (4096,), torch.float32, 64)
    for dtype in DTYPES:
        got, expected = dequantize_nf4(q, dtype=dtype), truth(q).to(dtype)
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(bits(got[~nan]), bits(expected[~nan]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7, 1, 11), (64, 96)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    q = quantize_nf4(w, double_quant=True)
    assert q.shape == shape
    assert torch.equal(dequantize_nf4(q), truth(q))
    if w.dim() == 2:
        assert torch.equal(quantize_nf4(w.T).packed, reference(w.T.contiguous(), 64).packed)
        assert torch.equal(quantize_nf4(w[:, ::3]).packed, reference(w[:, ::3].contiguous(), 64).packed)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 63, 64, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_raises(bad: float, where: int, dtype: torch.dtype) -> None:
    w = torch.zeros(100, dtype=dtype)
    w[where] = bad
    with pytest.raises(ValueError, match="w: expected finite values"):
        quantize_nf4(w)


def test_declines_float64() -> None:
    with pytest.raises(lora_ops.BackendError, match="triton kernels have no float64"):
        dequantize_nf4(reference(torch.randn(64), 64), dtype=torch.float64)


@settings(max_examples=10)
@given(
    n=st.integers(1 << 15, 1 << 16),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_traffic(n: int, dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    """One launch, and at most 5 % more bytes than what is read and written."""
    w = torch.randn(n, dtype=dtype)
    with count_traffic() as t:
        packed, absmax = torch.ops.lora_ops.quantize_nf4(w, block_size)
    assert t.launches == 1
    assert t.total <= 1.05 * (w.nbytes + packed.nbytes + absmax.nbytes), t
    q = reference(w, block_size, double_quant)
    with count_traffic() as t:
        out = dequantize_nf4(q)
    assert t.launches == 1
    assert t.total <= 1.05 * (q.nbytes + out.nbytes), t
