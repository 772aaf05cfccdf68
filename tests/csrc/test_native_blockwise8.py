"""8-bit blockwise codes in C++: the exactly nearest code, on every instruction set."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ops.quant.blockwise8 import native_impl
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native

GUARD = 64


def scaled(x: Tensor, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """v = x / absmax in [-1, 1] as fp32, and absmax, by the definition."""
    values, scales = [], []
    for block in x.reshape(-1).split(block_size):
        absmax = block.abs().max()
        least = absmax.clamp(min=1e-38)
        full = block.numel() == block_size
        values.append((block * (1.0 / least) if full else block / least).clamp(-1, 1))
        scales.append(absmax)
    return torch.cat(values).numpy(), torch.stack(scales).numpy()


def nearest(v: np.ndarray, code_map: Tensor) -> np.ndarray:
    """argmin |v - map|, in float64, which holds these differences exactly enough to order them; ties to the lower."""
    table = code_map.double().numpy()
    return np.abs(v.astype(np.float64)[:, None] - table).argmin(axis=1).astype(np.uint8)


def draw(kind: str, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    scale = {"normal": 1.0, "denormal": 1e-39, "tiny": 1.2e-38, "huge": 3e37, "zeros": 0.0}.get(kind)
    return x * (10 ** (torch.rand(n, generator=g) * 10 - 8)) if scale is None else x * scale


@given(
    st.sampled_from(("normal", "denormal", "tiny", "huge", "zeros", "wide")),
    st.integers(1, 2000),
    st.sampled_from((1, 7, 32, 33, 64, 100, 256, 4096)),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_quantize_equals_definition(isa: str, kind: str, n: int, block_size: int, signed: bool, seed: int) -> None:
    x = draw(kind, n, seed)
    n_blocks = -(-n // block_size)
    codes = torch.full((n + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    absmax = torch.full((n_blocks + 2 * GUARD,), torch.nan)
    native_impl.quantize(x, block_size, dynamic_map(signed), codes[GUARD:], absmax[GUARD:])
    v, expected_absmax = scaled(x, block_size)
    np.testing.assert_array_equal(codes[GUARD : GUARD + n].numpy(), nearest(v, dynamic_map(signed)))
    np.testing.assert_array_equal(absmax[GUARD : GUARD + n_blocks].numpy(), expected_absmax)
    assert (codes[:GUARD] == 0xA5).all()
    assert (codes[GUARD + n :] == 0xA5).all()
    assert absmax[:GUARD].isnan().all()
    assert absmax[GUARD + n_blocks :].isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_the_midpoints(isa: str, signed: bool) -> None:
    """The fp32 values on both sides of every midpoint, judged in rational arithmetic."""
    table = dynamic_map(signed)
    middle = ((table[:-1].double() + table[1:].double()) / 2).float()
    inf = torch.tensor(torch.inf)
    v = torch.cat([table, middle, middle.nextafter(inf), middle.nextafter(-inf)]).clamp(-1, 1)
    v = torch.cat([v, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0])])
    x = torch.cat([v.repeat_interleave(31), torch.zeros(-v.numel() * 31 % 31)]).view(-1, 31)
    x = torch.cat([x, torch.ones(x.shape[0], 1)], dim=1)  # absmax 1: v is x itself
    codes, _ = native_impl.quantize_blockwise8(x, 32, signed)
    exact = [Fraction(c) for c in table.tolist()]
    for value, row in zip(v.tolist(), codes.tolist(), strict=True):
        distance = [abs(Fraction(value) - c) for c in exact]
        assert set(row[:31]) == {distance.index(min(distance))}, value


@given(
    st.sampled_from(("even", "random", "steep", "one-sided", "nearly dynamic")), st.booleans(), st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=60)
def test_any_ascending_map(isa: str, kind: str, signed: bool, seed: int) -> None:
    """Maps that the lines of the dynamic ones do not fit: the nearest code all the same."""
    g = torch.Generator().manual_seed(seed)
    table = {
        "even": torch.linspace(-1, 1, 256),
        "random": torch.rand(256, generator=g) * 2 - 1,
        "steep": 10 ** (torch.rand(256, generator=g) * 6 - 6),
        "one-sided": torch.rand(256, generator=g) - 1,
        "nearly dynamic": dynamic_map(signed) * (1 - 0.004 * torch.rand(256, generator=g)),
    }[kind]
    table = table.clamp(-1, 1).sort().values
    if table.unique().numel() < 256:
        return
    x = draw("wide", 1000, seed)
    codes, absmax = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
    native_impl.quantize(x, 256, table, codes, absmax)
    np.testing.assert_array_equal(codes.numpy(), nearest(scaled(x, 256)[0], table))
    out = torch.empty(1000)
    native_impl.dequantize(codes, absmax, 256, table, out)
    assert torch.equal(out, table[codes.int()] * absmax.repeat_interleave(256)[:1000])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {1: 1e-12, -1: -1e-12},  # a threshold among the values that the lines take for 2^-31
        {0: 1e-10},
        {-1: -5e-7},  # not mirrored
        {1: 5e-7},
    ],
)
def test_dynamic_maps_with_a_value_changed(isa: str, signed: bool, change: dict[int, float]) -> None:
    """Lines that serve the dynamic maps may serve these, what mirrors one half of a map may not."""
    table, zero = dynamic_map(signed).clone(), 127 if signed else 0
    for at, value in change.items():
        if zero + at >= 0:
            table[zero + at] = value
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2560, generator=g).sign() * 10 ** (torch.rand(2560, generator=g) * 16 - 16)
    x[::256] = 1.0
    codes, absmax = torch.empty(2560, dtype=torch.uint8), torch.empty(10)
    native_impl.quantize(x, 256, table, codes, absmax)
    np.testing.assert_array_equal(codes.numpy(), nearest(scaled(x, 256)[0], table))
    every = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256)
    native_impl.dequantize(every, torch.ones(1), 256, table, out)
    assert torch.equal(out.view(torch.int32), table.view(torch.int32))


@pytest.mark.parametrize("signed", [True, False])
def test_zero_codes_to_zero(isa: str, signed: bool) -> None:
    for n in (256, 300):
        x = torch.zeros(n)
        codes, absmax = native_impl.quantize_blockwise8(x, 256, signed)
        assert (native_impl.dequantize_blockwise8(codes, absmax, 256, signed) == 0).all()
        assert (dynamic_map(signed)[codes.int()] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 70_001])
@pytest.mark.parametrize("block_size", [1, 100, 256])
def test_dequantize(isa: str, two_threads: None, signed: bool, n: int, block_size: int) -> None:
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // block_size))
    expected = dynamic_map(signed)[codes.int()] * absmax[torch.arange(n) // block_size]
    actual = native_impl.dequantize_blockwise8(codes, absmax, block_size, signed)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 255, 50_000, 69_999, 70_000])
def test_quantize_refuses_nonfinite(isa: str, two_threads: None, bad: float, place: int) -> None:
    x = torch.randn(70_001)
    x[place] = bad
    with pytest.raises(ValueError, match="x: expected finite values, got inf or NaN"):
        native_impl.quantize_blockwise8(x, 256, True)


def test_threads_do_not_change_bytes(isa: str) -> None:
    x = torch.randn(100_003)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native_impl.quantize_blockwise8(x, 100, True))
    torch.set_num_threads(before)
    for codes, absmax in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(absmax, results[0][1])


def test_bitsandbytes_default_backend_agrees_up_to_its_rounded_midpoints(isa: str) -> None:
    """Its torch code compares with fp32 midpoints; its C++ code with a table of 65,536 bins, so not that."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(bnb.create_dynamic_map(signed=True), dynamic_map(True))
    assert torch.equal(bnb.create_dynamic_map(signed=False), dynamic_map(False))
    from bitsandbytes.backends.default.ops import _dequantize_blockwise_compute

    x = torch.randn(1000)
    codes, absmax = native_impl.quantize_blockwise8(x, 256, True)
    theirs = _dequantize_blockwise_compute.__wrapped__(codes, absmax, dynamic_map(True), 256, torch.float32)
    assert torch.equal(native_impl.dequantize_blockwise8(codes, absmax, 256, True), theirs)


def test_an_unsorted_map_is_refused() -> None:
    x, codes, absmax = torch.zeros(8), torch.zeros(8, dtype=torch.uint8), torch.zeros(1)
    with pytest.raises(native.NativeError, match="blockwise8_quantize"):
        native_impl.quantize(x, 8, dynamic_map(True).flip(0).contiguous(), codes, absmax)
