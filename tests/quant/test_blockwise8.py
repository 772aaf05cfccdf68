"""8-bit blockwise codes on every backend: exactly the nearest code, ties to the lower, zero to zero."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_ops
from lora_ops.functional import dequantize_blockwise8, quantize_blockwise8
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native
from tests.cases import backends_here


def nearest(v: float, table: list[Fraction]) -> int:
    """The nearest code of a float32 value in rational arithmetic; a tie takes the lower."""
    return min(range(256), key=lambda c: (abs(Fraction(v) - table[c]), c))


@pytest.mark.parametrize("signed", [True, False])
def test_values_at_the_midpoints(backend: str, signed: bool) -> None:
    """The float32 neighbours of every midpoint, which may itself not be a float32."""
    code = dynamic_map(signed)
    mid = ((code[:-1].double() + code[1:].double()) / 2).float()
    up, down = torch.nextafter(mid, mid + 1), torch.nextafter(mid, mid - 1)
    x = torch.cat([mid, up, down, torch.ones(1)])  # the one makes absmax 1, so that v = x
    codes, absmax = quantize_blockwise8(x, block_size=4096, signed=signed)
    table = [Fraction(c) for c in code.tolist()]
    assert absmax.tolist() == [1.0]
    assert codes.tolist() == [nearest(v, table) for v in x.tolist()]


@pytest.mark.parametrize("backend", backends_here())
@given(
    n=st.integers(0, 700), block_size=st.sampled_from([1, 7, 64, 256]), signed=st.booleans(), seed=st.integers(0, 99)
)
def test_round_trip(backend: str, n: int, block_size: int, signed: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    x = x if signed else x.abs()
    x[torch.rand(n, generator=g) < 0.2] = 0.0
    with lora_ops.use_backend(backend):
        codes, absmax = quantize_blockwise8(x, block_size=block_size, signed=signed)
        back = dequantize_blockwise8(codes, absmax, block_size=block_size, signed=signed)
    assert torch.equal(back[x == 0], torch.zeros_like(back[x == 0]))
    blocks = [x[i : i + block_size].abs().max() for i in range(0, n, block_size)]
    assert absmax.tolist() == [float(b) for b in blocks]
    scale = absmax[torch.arange(n) // block_size]
    gap = dynamic_map(signed).diff().max()
    assert bool(((back - x).abs() <= scale * gap / 2 * 1.0001).all())


def test_backends_agree_bit_for_bit() -> None:
    if reason := native.unavailable_reason():
        pytest.skip(f"native backend: {reason}")
    x = torch.randn(100_003) * torch.logspace(-30, 30, 100_003)
    results = []
    for name in backends_here():
        with lora_ops.use_backend(name):
            codes, absmax = quantize_blockwise8(x)
            results.append((codes, absmax, dequantize_blockwise8(codes, absmax)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_errors_and_opcheck(backend: str) -> None:
    x = torch.randn(300)
    with pytest.raises(ValueError, match="x: expected finite values"):
        quantize_blockwise8(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="x: expected dtype float32, got float16"):
        quantize_blockwise8(x.half())
    with pytest.raises(ValueError, match="block_size: expected a positive integer, got 0"):
        quantize_blockwise8(x, block_size=0)
    codes, absmax = quantize_blockwise8(x)
    with pytest.raises(ValueError, match=r"absmax: expected \(n_blocks=2\), got \(1,\)"):
        dequantize_blockwise8(codes, absmax[:1])
    torch.library.opcheck(torch.ops.lora_ops.quantize_blockwise8.default, (x, 256, True))
    torch.library.opcheck(torch.ops.lora_ops.dequantize_blockwise8.default, (codes, absmax, 256, True))
