"""quantize_nf4 and dequantize_nf4: every backend against bitsandbytes' bytes, golden bytes and float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import lora_ops
from lora_ops.functional import dequantize_nf4, quantize_nf4
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.frozen import operands
from lora_ops.quant.nf4 import BLOCK_SIZES, NF4_CODE, NF4Tensor, nf4_thresholds
from tests.cases import backends_here

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
bnb = pytest.importorskip("bitsandbytes.functional")

shapes = st.lists(st.integers(0, 70), min_size=1, max_size=3).map(tuple)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bit pattern, so that -0 and 0, or two NaNs, compare as bytes do."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of very different scales, with zero blocks, denormals and values at and one ulp around the thresholds."""
    g = torch.Generator().manual_seed(seed)
    n = int(np.prod(shape))
    w = torch.randn(n, generator=g)
    kind = torch.randint(0, 6, (n // 32 + 1,), generator=g).repeat_interleave(32)[:n]
    w[kind == 1] = 0.0
    w[kind == 2] *= 1e-40  # denormal
    w[kind == 3] *= 1e30
    at = nf4_thresholds()[torch.randint(0, 15, (n,), generator=g)]
    around = torch.stack([at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1), torch.ones(n)])
    choice = torch.randint(0, 4, (n,), generator=g)
    w[kind == 4] = around.gather(0, choice[None])[0][kind == 4]
    w = w.to(dtype)
    return torch.where(torch.isfinite(w), w, torch.ones_like(w)).view(shape)


def truth(q: NF4Tensor) -> torch.Tensor:
    """NF4_CODE[code] · absmax in float32, element by element in numpy."""
    packed = q.packed.view(-1).numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: q.numel()]
    absmax = q.absmax.numpy()
    if q.nested:
        nested = q.nested_absmax.numpy()[np.arange(absmax.size) // 256]
        absmax = dynamic_map(True).numpy()[absmax] * nested + q.nested_offset.numpy()
    value = np.array(NF4_CODE, dtype=np.float32)[codes] * absmax[np.arange(q.numel()) // q.block_size]
    return torch.from_numpy(value.astype(np.float32)).view(q.shape)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
class TestAgainstBitsandbytes:
    @given(
        shape=shapes,
        dtype=st.sampled_from(DTYPES),
        block_size=st.sampled_from(BLOCK_SIZES),
        seed=st.integers(0, 2**31),
    )
    def test_bytes(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype, block_size: int, seed: int) -> None:
        w = weights(shape, dtype, seed)
        with lora_ops.use_backend(backend):
            q = quantize_nf4(w, block_size=block_size)
        if w.numel() == 0:  # bitsandbytes cannot take an empty tensor
            assert q.packed.shape == (0, 1)
            assert q.absmax.shape == (0,)
            return
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
        assert torch.equal(q.packed, packed)
        assert torch.equal(bits(q.absmax), bits(state.absmax))

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bytes_of_a_large_weight(self, backend: str, block_size: int, dtype: torch.dtype) -> None:
        w = weights((517, 1031), dtype, 1)
        with lora_ops.use_backend(backend):
            q = quantize_nf4(w, block_size=block_size)
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
        assert torch.equal(q.packed, packed)
        assert torch.equal(bits(q.absmax), bits(state.absmax))

    @pytest.mark.parametrize("shape", [(64, 96), (300, 256), (1000, 333), (7,)])
    def test_double_quantization(self, backend: str, shape: tuple[int, ...]) -> None:
        w = torch.randn(shape)
        with lora_ops.use_backend(backend):
            q = quantize_nf4(w, double_quant=True)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert torch.equal(q.nested_offset, state.offset)
        # The CPU wheel's 8-bit quantizer is a table of 65,536 bins; ours is the exactly nearest code.
        absmax = quantize_nf4(w).absmax - q.nested_offset
        scale = q.nested_absmax.double().clamp(min=1e-38)[torch.arange(absmax.numel()) // 256]
        code = dynamic_map(True).double()
        distance = (absmax.double()[:, None] / scale[:, None] - code).abs()
        chosen = distance.gather(1, q.absmax.long()[:, None])[:, 0]
        # One float32 rounding of the quotient may move a value across a midpoint that lies closer than that.
        assert bool((chosen <= distance.amin(1) + 2**-23).all())
        if absmax.numel() > 1:  # the wheel codes 0 / 0, the deviation of a single block from its own mean, as -1
            assert (q.absmax.int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
class TestDequantize:
    @given(
        shape=shapes,
        dtype=st.sampled_from((*DTYPES, torch.float64)),
        block_size=st.sampled_from(BLOCK_SIZES),
        double_quant=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_bit_equal(
        self,
        backend: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        block_size: int,
        double_quant: bool,
        seed: int,
    ) -> None:
        if dtype == torch.float64 and backend == "native":
            dtype = torch.float32
        w = weights(shape, torch.float32, seed)
        with lora_ops.use_backend(backend):
            q = quantize_nf4(w, block_size=block_size, double_quant=double_quant)
            expected = truth(q).to(dtype)
            assert torch.equal(bits(dequantize_nf4(q, dtype=dtype)), bits(expected))
            out = torch.full(shape, torch.nan, dtype=dtype)
            assert dequantize_nf4(q, out=out) is out
            assert torch.equal(bits(out), bits(expected))

    @given(
        n=st.integers(0, 150),
        k=st.integers(0, 150),
        dtype=st.sampled_from((*DTYPES, torch.float64)),
        block_size=st.sampled_from(BLOCK_SIZES),
        double_quant=st.booleans(),
    )
    def test_into_a_transpose(
        self, backend: str, n: int, k: int, dtype: torch.dtype, block_size: int, double_quant: bool
    ) -> None:
        if dtype == torch.float64 and backend == "native":
            dtype = torch.float32
        with lora_ops.use_backend(backend):
            q = quantize_nf4(weights((n, k), torch.float32, n), block_size=block_size, double_quant=double_quant)
            buffer = torch.full((k, n), torch.nan, dtype=dtype)
            out = buffer.t()
            assert dequantize_nf4(q, out=out) is out
            assert torch.equal(bits(buffer), bits(truth(q).to(dtype).t()))

    def test_every_code_and_extreme_scale(self, backend: str) -> None:
        """All 256 bytes at denormal, huge, infinite and NaN scales, rounded to nearest even."""
        packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).view(-1, 1)
        absmax = torch.tensor([1e-45, 1e-38, 6e-8, 65504, 65520, 3.4e38, torch.inf, torch.nan]).repeat(8)
        q = NF4Tensor(packed, absmax, (4096,), torch.float32, 64)
        with lora_ops.use_backend(backend):
            for dtype in DTYPES:
                got, expected = dequantize_nf4(q, dtype=dtype), truth(q).to(dtype)
                nan = expected.isnan()
                assert torch.equal(got.isnan(), nan)
                assert torch.equal(bits(got[~nan]), bits(expected[~nan]))

    def test_ragged_rows_that_bitsandbytes_gets_wrong(self, backend: str) -> None:
        w = torch.randn(64, 96)
        with lora_ops.use_backend(backend):
            q = quantize_nf4(w)
            assert torch.equal(dequantize_nf4(q), truth(q))


def test_format_is_stable(backend: str) -> None:
    """Golden bytes: the format must not drift, whichever bitsandbytes is at hand."""
    golden = load_file(Path(__file__).parents[1] / "golden" / "nf4.safetensors")
    for i in range(4):
        w, block_size = golden[f"{i}.w"], int(golden[f"{i}.block_size"])
        q = quantize_nf4(w, block_size=block_size)
        assert torch.equal(q.packed, golden[f"{i}.packed"])
        assert torch.equal(bits(q.absmax), bits(golden[f"{i}.absmax"]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 63, 64, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_raises(backend: str, bad: float, where: int, dtype: torch.dtype) -> None:
    w = torch.zeros(100, dtype=dtype)
    w[where] = bad
    with pytest.raises(ValueError, match="w: expected finite values"):
        quantize_nf4(w)


def test_non_contiguous(backend: str) -> None:
    w = torch.randn(96, 64)
    assert torch.equal(quantize_nf4(w.T).packed, quantize_nf4(w.T.contiguous()).packed)
    assert torch.equal(quantize_nf4(w[:, ::3]).packed, quantize_nf4(w[:, ::3].contiguous()).packed)


def test_errors() -> None:
    w = torch.randn(8, 8)
    q = quantize_nf4(w)
    with pytest.raises(ValueError, match=r"block_size: expected one of .*got 48"):
        quantize_nf4(w, block_size=48)
    with pytest.raises(ValueError, match="w: expected dtype float32, bfloat16, float16, got int64"):
        quantize_nf4(torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"w: expected a torch.Tensor, got list"):
        quantize_nf4([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="q: expected an NF4Tensor"):
        dequantize_nf4(w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"out: expected dtype float32, got bfloat16"):
        dequantize_nf4(q, dtype=torch.float32, out=torch.empty(8, 8, dtype=torch.bfloat16))
    for strided in (torch.empty(8, 16)[:, ::2], torch.empty(8, 9)[:, :8].t(), torch.empty(8, 9).t(), torch.empty(64)):
        with pytest.raises(ValueError, match=r"out: expected a tensor of shape \(8, 8\) on cpu, contig"):
            dequantize_nf4(q, out=strided)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        dequantize_nf4(q, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"q.packed: expected torch.uint8 of shape \(32, 1\)"):
        dequantize_nf4(NF4Tensor(q.packed[:-1], q.absmax, (8, 8), torch.float32))
    with pytest.raises(ValueError, match=r"q.absmax: expected torch.float32 of shape \(1,\)"):
        dequantize_nf4(NF4Tensor(q.packed, q.absmax.double(), (8, 8), torch.float32))


def test_opcheck(backend: str) -> None:
    w = torch.randn(12, 20)
    torch.library.opcheck(torch.ops.lora_ops.quantize_nf4.default, (w, 64))
    for double_quant in (False, True):
        q = quantize_nf4(w, double_quant=double_quant)
        torch.library.opcheck(torch.ops.lora_ops.dequantize_nf4.default, (*operands(q), torch.bfloat16))
        torch.library.opcheck(torch.ops.lora_ops.dequantize_nf4_out.default, (*operands(q), torch.empty(12, 20)))
        torch.library.opcheck(torch.ops.lora_ops.dequantize_nf4_out.default, (*operands(q), torch.empty(20, 12).t()))


def test_nbytes() -> None:
    q = quantize_nf4(torch.randn(512, 512), double_quant=True)
    n_blocks = 512 * 512 // 64
    assert q.nbytes == 512 * 512 // 2 + n_blocks + 4 * n_blocks // 256 + 4


def test_compiles_without_break(backend: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(w: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(quantize_nf4(w, double_quant=True))

    w = torch.randn(16, 64)
    assert torch.equal(round_trip(w), dequantize_nf4(quantize_nf4(w, double_quant=True)))


def test_compiles_into_a_transpose(backend: str) -> None:
    q = quantize_nf4(torch.randn(24, 64))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def decode(buffer: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(q, out=buffer.t())

    buffer = torch.full((64, 24), torch.nan)
    assert torch.equal(decode(buffer), dequantize_nf4(q))
    assert torch.equal(buffer, dequantize_nf4(q).t())
