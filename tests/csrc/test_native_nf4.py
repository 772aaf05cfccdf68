"""NF4 in C++, byte for byte: against numpy with exact comparisons, against bitsandbytes, on every instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import BLOCK_SIZES, NF4_CODE, NF4Tensor
from lora_ops.quant.nf4 import native_abi as nf4_abi
from lora_ops.quant.nf4.codec import native_impl
from lora_ops.quant.nf4.codec.reference import absmax_of
from lora_ops.runtime import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE = np.array(NF4_CODE, dtype=np.float32)
THRESHOLDS = (CODE[:-1] + CODE[1:]) / np.float32(2)
GUARD = 64  # bytes on both sides of an output that must stay untouched


def view(packed: torch.Tensor, absmax: torch.Tensor, block_size: int) -> nf4_abi.NF4Weight:
    """The C view of a flat weight."""
    return nf4_abi.NF4Weight(packed.data_ptr(), absmax.data_ptr(), block_size=block_size)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Same bytes, except that any NaN equals any other."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_same_bytes(actual[~nan], expected[~nan])


def quantize_exactly(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The definition of the format, one block at a time."""
    x = w.float().numpy().reshape(-1)
    codes, scales = np.zeros(x.size + x.size % 2, dtype=np.uint8), []
    codes[x.size :] = 7  # the padding nibble codes zero
    least = np.float32(1e-38)
    for begin in range(0, x.size, block_size):
        block = x[begin : begin + block_size]
        absmax = np.abs(block).max()
        if block.size == block_size:
            v = block * (np.float32(1) / max(absmax, least))
        else:
            absmax = max(absmax, least)
            v = block / absmax
        scales.append(absmax)
        codes[begin : begin + block.size] = (v[:, None] > THRESHOLDS).sum(axis=1)
    packed = torch.from_numpy(codes[0::2] << 4 | codes[1::2]).view(-1, 1)
    return packed, torch.tensor([float(s) for s in scales])


def dequantize_exactly(packed: Tensor, absmax: Tensor, block_size: int, n: int, dtype: torch.dtype) -> Tensor:
    p = packed.view(-1)
    codes = torch.stack([p >> 4, p & 15], dim=1).view(-1)[:n]
    product = torch.tensor(NF4_CODE)[codes.int()] * absmax[torch.arange(n) // block_size]
    return product.to(dtype)


def near_thresholds(n: int) -> Tensor:
    """1 in every 32nd place, so that v is w itself; thresholds, and their fp32 neighbours, between."""
    t = torch.from_numpy(THRESHOLDS)
    inf = torch.tensor(torch.inf)
    values = torch.cat([t, t.nextafter(inf), t.nextafter(-inf)])
    w = values.repeat(n // values.numel() + 1)[:n].clone()
    w[::32] = 1.0
    return w


KINDS = ("normal", "denormal", "tiny", "huge", "zeros", "sparse", "wide", "thresholds")


def draw(kind: str, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    if kind == "denormal":
        x = x * 1e-39
    elif kind == "tiny":
        x = x * 1.2e-38
    elif kind == "huge":
        x = x.clamp(-3, 3) * (torch.finfo(dtype).max / 4)
    elif kind == "zeros":
        x = torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0)
    elif kind == "sparse":
        x = x * (torch.rand(n, generator=g) < 0.01)
    elif kind == "wide":
        x = x * 10 ** (torch.rand(n, generator=g) * 8 - 6)
    elif kind == "thresholds":
        x = near_thresholds(n)
    return x.to(dtype)


cases = st.tuples(
    st.sampled_from(KINDS),
    st.one_of(st.integers(0, 200), st.integers(0, 9000)),
    st.sampled_from(DTYPES),
    st.sampled_from(BLOCK_SIZES),
    st.integers(0, 2**31),
)


def quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The native kernel on buffers with guards around them."""
    n_bytes, n_blocks = (w.numel() + 1) // 2, -(-w.numel() // block_size)
    packed = torch.full((n_bytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((n_blocks + 2 * GUARD,), torch.nan)
    nf4_abi.quantize(w, block_size, packed[GUARD:], absmax[GUARD:])
    assert (packed[:GUARD] == 0xA5).all()
    assert (packed[GUARD + n_bytes :] == 0xA5).all()
    assert absmax[:GUARD].isnan().all()
    assert absmax[GUARD + n_blocks :].isnan().all()
    return packed[GUARD : GUARD + n_bytes].view(-1, 1), absmax[GUARD : GUARD + n_blocks]


def test_code_book_is_the_one_of_python() -> None:
    assert nf4_abi.code() == NF4_CODE


@given(cases)
@settings(deadline=None, max_examples=150)
def test_quantize_equals_definition(isa: str, case: tuple) -> None:
    kind, n, dtype, block_size, seed = case
    w = draw(kind, n, dtype, seed)
    packed, absmax = quantize(w, block_size)
    expected_packed, expected_absmax = quantize_exactly(w, block_size)
    assert_same_bytes(packed, expected_packed)
    assert_same_bytes(absmax, expected_absmax)


@given(cases)
@settings(deadline=None, max_examples=80)
def test_quantize_equals_bitsandbytes(isa: str, case: tuple) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    kind, n, dtype, block_size, seed = case
    n = max(n, 1)  # bitsandbytes refuses an empty tensor
    w = draw(kind, n, dtype, seed)
    packed, absmax = quantize(w, block_size)
    expected, state = functional.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    assert_same_bytes(packed, expected)
    assert_same_bytes(absmax, state.absmax)


def test_full_blocks_multiply_and_partial_ones_divide(isa: str) -> None:
    """Values whose code depends on it: thresholds times absmax, and their fp32 neighbours."""
    t, inf = torch.from_numpy(THRESHOLDS), torch.tensor(torch.inf)
    codes_that_differ = 0
    for absmax in torch.linspace(1, 2, 60)[1:]:
        near = torch.cat([t * absmax, (t * absmax).nextafter(inf), (t * absmax).nextafter(-inf)])
        partial = torch.cat([absmax.view(1), near])
        full = torch.cat([partial, torch.zeros(64 - partial.numel())])
        for w in (partial, full):
            for actual, expected in zip(quantize(w, 64), quantize_exactly(w, 64), strict=True):
                assert_same_bytes(actual, expected)
        same = quantize(partial, 64)[0] == quantize(full, 64)[0][: partial.numel() // 2]
        codes_that_differ += int((~same).sum())
    assert codes_that_differ > 0  # or the values above would prove nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absmax", [1.0, 3.0, 0.0123])
def test_quantize_every_16_bit_value(isa: str, dtype: torch.dtype, absmax: float) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bound = torch.tensor(absmax).to(dtype)
    inside = every[every.float().abs() <= bound.float()]
    n = inside.numel() // 31 * 31
    w = torch.cat([inside[:n].view(-1, 31), bound.expand(n // 31, 1)], dim=1).reshape(-1)
    packed, scales = quantize(w, 32)
    expected_packed, expected_scales = quantize_exactly(w, 32)
    assert_same_bytes(packed, expected_packed)
    assert_same_bytes(scales, expected_scales)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 40_000, 99_999, 100_001])
def test_quantize_refuses_nonfinite(isa: str, two_threads: None, bad: float, dtype: torch.dtype, place: int) -> None:
    w = torch.randn(100_002).to(dtype)
    w[place] = bad
    with pytest.raises(ValueError, match="w: expected finite values, got inf or NaN"):
        native_impl.quantize_nf4(w, 64)


def test_quantize_is_finite_at_the_largest_values(isa: str) -> None:
    for dtype in DTYPES:
        w = torch.full((70,), torch.finfo(dtype).max, dtype=dtype)
        packed, absmax = quantize(w, 64)
        assert (packed == 0xFF).all()
        assert (absmax == torch.finfo(dtype).max).all()


def test_quantize_takes_noncontiguous_input(isa: str) -> None:
    w = torch.randn(96, 80).t()
    for actual, expected in zip(native_impl.quantize_nf4(w, 64), quantize_exactly(w.contiguous(), 64), strict=True):
        assert_same_bytes(actual, expected)


@given(
    st.integers(0, 5000).flatmap(lambda end: st.tuples(st.integers(0, end), st.just(end))),
    st.sampled_from(DTYPES),
    st.sampled_from(BLOCK_SIZES),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_dequantize_of_any_range(
    isa: str, span: tuple[int, int], dtype: torch.dtype, block_size: int, seed: int
) -> None:
    begin, end = span
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((end + 1) // 2,), dtype=torch.uint8, generator=g)
    absmax = torch.randn(end // block_size + 1, generator=g)
    buffer = torch.full((end - begin + 2 * GUARD,), torch.nan, dtype=dtype)
    nf4_abi.dequantize(view(packed, absmax, block_size), begin, end, buffer[GUARD:])
    expected = dequantize_exactly(packed, absmax, block_size, end, dtype)[begin:]
    assert_same_bytes(buffer[GUARD : GUARD + end - begin], expected)
    assert buffer[:GUARD].isnan().all()
    assert buffer[GUARD + end - begin :].isnan().all()


@pytest.mark.parametrize("block_size", [32, 64])  # decoded half by half, and whole
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_of_any_absmax(isa: str, dtype: torch.dtype, block_size: int) -> None:
    """Denormal, infinite, NaN and negative scales, and products that overflow or vanish in the result's dtype."""
    g = torch.Generator().manual_seed(0)
    random_bits = torch.randint(-(2**31), 2**31, (20_000,), generator=g).to(torch.int32).view(torch.float32)
    near_limits = torch.randn(5_000, generator=g) * torch.tensor([65_504.0, 6e-8, 6e-5, 3.4e38, 1e-38]).repeat(1_000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4028235e38])
    # NaNs that rounding, if it took them for numbers, would carry over into -0 and 0.
    full_nans = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)
    absmax = torch.cat([random_bits, near_limits, special, full_nans])
    n = absmax.numel() * block_size
    packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, generator=g)
    out = torch.empty(n, dtype=dtype)
    nf4_abi.dequantize(view(packed, absmax, block_size), 0, n, out)
    assert_same_values(out, dequantize_exactly(packed, absmax, block_size, n, dtype))
    shifted = torch.empty(n - 1, dtype=dtype)  # odd begin: other elements take the scalar path
    nf4_abi.dequantize(view(packed, absmax, block_size), 1, n, shifted)
    assert_same_bytes(shifted, out[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begin", [0, 1, 333])
def test_dequantize_nested(isa: str, dtype: torch.dtype, begin: int) -> None:
    n, block_size = 300 * 64 + 17, 64
    g = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=g)
    codes = torch.randint(0, 256, (301,), dtype=torch.uint8, generator=g)
    nested_absmax = torch.rand(2, generator=g)
    offset = torch.tensor(0.123456)
    scaled = dynamic_map(True)[codes.int()] * nested_absmax.repeat_interleave(256)[:301]
    absmax = scaled + offset
    weight = nf4_abi.weight_of(NF4Tensor(packed, codes, (n,), torch.float32, block_size, nested_absmax, offset))
    out = torch.full((n - begin,), torch.nan, dtype=dtype)
    nf4_abi.dequantize(weight, begin, n, out)
    assert_same_bytes(out, dequantize_exactly(packed, absmax, block_size, n, dtype)[begin:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bytes(isa: str, dtype: torch.dtype) -> None:
    w = torch.randn(100_003).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, absmax = quantize(w, 128)
        out = torch.empty(100_000, dtype=dtype)
        nf4_abi.dequantize(view(packed, absmax, 128), 3, 100_003, out)
        results.append((packed, absmax, out))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bytes(a, b)


@pytest.mark.parametrize("k", [64, 96, 65])
def test_decode_a_part(isa: str, k: int) -> None:
    w = torch.randn(50, k)
    packed, absmax = native_impl.quantize_nf4(w, 64)
    q = NF4Tensor(packed, absmax, (50, k), torch.float32, 64)
    everything = native_impl.dequantize_nf4(q, torch.bfloat16)
    panel = torch.full((7, k), torch.nan, dtype=torch.bfloat16)
    nf4_abi.dequantize(nf4_abi.weight_of(q), 13 * k, 20 * k, panel)
    assert_same_bytes(panel, everything[13:20])


def test_dequantize_into_out(isa: str) -> None:
    w = torch.randn(64, 33)
    packed, absmax = native_impl.quantize_nf4(w, 64)
    q = NF4Tensor(packed, absmax, (64, 33), torch.float32, 64)
    out = torch.full((64, 33), torch.nan)
    assert native_impl.dequantize_nf4(q, torch.float32, out) is out
    assert_same_bytes(out.view(-1), dequantize_exactly(packed, absmax, 64, w.numel(), torch.float32))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, int, torch.dtype, int, bool, int, int]:
    """(N, K, dtype, block size, nested, threads, seed): tiles and blocks cut off, and several of both."""
    side = st.one_of(st.integers(0, 5), st.integers(1, 300), st.sampled_from([32, 64, 128, 256, 288]))
    n, k = draw(side), draw(side)
    dtype, block_size = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(BLOCK_SIZES))
    return n, k, dtype, block_size, draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))


@given(matrices(), st.sampled_from(KINDS))
@settings(deadline=None, max_examples=150)
def test_quantize_transposed(isa: str, case: tuple, kind: str) -> None:
    n, k, dtype, block_size, _, threads, seed = case
    w = draw(kind, n * k, dtype, seed).view(n, k)
    n_bytes, n_blocks = (n * k + 1) // 2, -(-n * k // block_size)
    packed = torch.full((n_bytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((n_blocks + 2 * GUARD,), torch.nan)
    torch.set_num_threads(threads)
    nf4_abi.quantize_transposed(w.t().contiguous(), block_size, packed[GUARD:], absmax[GUARD:])
    torch.set_num_threads(1)
    expected_packed, expected_absmax = quantize(w.contiguous(), block_size)
    assert_same_bytes(packed[GUARD : GUARD + n_bytes].view(-1, 1), expected_packed)
    assert_same_bytes(absmax[GUARD : GUARD + n_blocks], expected_absmax)
    assert (packed[:GUARD] == 0xA5).all()
    assert (packed[GUARD + n_bytes :] == 0xA5).all()
    assert absmax[:GUARD].isnan().all()
    assert absmax[GUARD + n_blocks :].isnan().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (150, 77), (299, 400)])
def test_quantize_transposed_refuses_nonfinite(isa: str, two_threads: None, bad: float, place: tuple[int, int]) -> None:
    w = torch.randn(401, 300)
    w.t()[place] = bad
    with pytest.raises(ValueError, match="w: expected finite values, got inf or NaN"):
        native_impl.quantize_nf4(w.t(), 64)


def test_quantize_makes_no_copy_of_a_transpose(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(80, 96)
    expected = native_impl.quantize_nf4(w.t().contiguous(), 64)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("a dense copy was made"))
    monkeypatch.setattr(nf4_abi, "quantize", None)
    for a, b in zip(native_impl.quantize_nf4(w.t(), 64), expected, strict=True):
        assert torch.equal(a, b)


def random_weight(n: int, k: int, block_size: int, nested: bool, g: torch.Generator) -> NF4Tensor:
    """Codes and scales with nothing behind them."""
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8, generator=g)
    blocks = -(-n * k // block_size)
    if not nested:
        return NF4Tensor(packed, torch.randn(blocks, generator=g), (n, k), torch.float32, block_size)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
    groups = torch.rand(-(-blocks // 256), generator=g)
    return NF4Tensor(packed, codes, (n, k), torch.float32, block_size, groups, torch.tensor(0.123456))


@given(matrices())
@settings(deadline=None, max_examples=150)
def test_dequantize_transposed(isa: str, case: tuple) -> None:
    n, k, dtype, block_size, nested, threads, seed = case
    q = random_weight(n, k, block_size, nested, torch.Generator().manual_seed(seed))
    buffer = torch.full((n * k + 2 * GUARD,), torch.nan, dtype=dtype)
    torch.set_num_threads(threads)
    nf4_abi.dequantize_transposed(nf4_abi.weight_of(q), buffer[GUARD : GUARD + n * k].view(k, n))
    torch.set_num_threads(1)
    expected = dequantize_exactly(q.packed, absmax_of(q), block_size, n * k, dtype).view(n, k)
    assert_same_bytes(buffer[GUARD : GUARD + n * k].view(k, n), expected.t())
    assert buffer[:GUARD].isnan().all()
    assert buffer[GUARD + n * k :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2048, 2080, 2047])  # lines that are streamed past the caches, and lines that cannot be
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_transposed_of_large_weights(
    isa: str, two_threads: None, dtype: torch.dtype, n: int, nested: bool
) -> None:
    k = 1027
    q = random_weight(n, k, 64, nested, torch.Generator().manual_seed(n))
    out = torch.full((k, n), torch.nan, dtype=dtype)
    nf4_abi.dequantize_transposed(nf4_abi.weight_of(q), out)
    assert_same_bytes(out, dequantize_exactly(q.packed, absmax_of(q), 64, n * k, dtype).view(n, k).t())


def test_native_declines_float64_and_other_devices() -> None:
    q = NF4Tensor(torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1), (64,), torch.float64, 64)
    assert "float64" in (native_impl.declines("dequantize_nf4", q.packed, q=q, dtype=torch.float64) or "")
    assert "float64" in (native_impl.declines("dequantize_nf4_out", q.packed, q=q, out=torch.empty(64).double()) or "")
    assert "float64" in (native_impl.declines("quantize_nf4", torch.zeros(64, dtype=torch.float64)) or "")
    assert "meta" in (native_impl.declines("quantize_nf4", torch.zeros(64, device="meta")) or "")
    assert native_impl.declines("dequantize_nf4", q.packed, q=q, dtype=torch.float32) is None


def test_bad_arguments_are_refused() -> None:
    lib = native.library()
    w, packed, absmax = torch.zeros(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    pointers = packed.data_ptr(), absmax.data_ptr()
    bad = 1
    assert lib.lora_ops_nf4_quantize(w.data_ptr(), 0, 64, 64, *pointers, 1) == 0
    assert lib.lora_ops_nf4_quantize(w.data_ptr(), 7, 64, 64, *pointers, 1) == bad
    assert lib.lora_ops_nf4_quantize(w.data_ptr(), 0, -1, 64, *pointers, 1) == bad
    assert lib.lora_ops_nf4_quantize(w.data_ptr(), 0, 64, 33, *pointers, 1) == bad
    assert lib.lora_ops_nf4_quantize(w.data_ptr(), 0, 64, 64, *pointers, 0) == bad
    assert lib.lora_ops_nf4_quantize(None, 0, 64, 64, *pointers, 1) == bad
    with pytest.raises(native.NativeError, match="nf4_dequantize"):
        nf4_abi.dequantize(view(packed, absmax, 64), 5, 4, w)
    with pytest.raises(native.NativeError, match="nf4_quantize_transposed"):
        nf4_abi.quantize_transposed(w.view(8, 8), 48, packed, absmax)
    with pytest.raises(native.NativeError, match="nf4_dequantize_transposed"):
        nf4_abi.dequantize_transposed(view(packed, absmax, 48), w.view(8, 8))
