"""The tolerance rule without its slack, where there are draws enough: RMS errors at most 1.25 times torch's own.

The slack grows with the number of terms, for the sake of single elements, and so hides a running sum that is too long.
Here the errors of many elements, and of many draws where M is small, are compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import pytest
import torch

from lora_ops.runtime import native
from lora_ops.runtime.backends import use_backend
from tests.cases import LinearCase, errors, run_ours
from tests.tolerance import RATIO

PLACES = ["reference", *(native.supported_isas() if native.available() else ())]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the native kernels on each instruction set of this machine."""
    on_native = request.param != "reference"
    with (
        native.force_isa(request.param) if on_native else nullcontext(),
        use_backend("native" if on_native else "reference"),
    ):
        yield request.param


def ratios(draws: int, **case: object) -> Mapping[str, float]:
    """By result, the RMS error of all draws over torch's own."""
    ours: dict[str, float] = {}
    own: dict[str, float] = {}
    for seed in range(draws):
        inputs = LinearCase(seed=seed, bias=True, **case).inputs()  # type: ignore[arg-type]
        for name, error in errors(inputs, run_ours(inputs)).items():
            ours[name] = ours.get(name, 0.0) + error.rms**2
            own[name] = own.get(name, 0.0) + error.own_rms**2
    return {name: math.sqrt(ours[name] / own[name]) if own[name] else 1.0 + ours[name] for name in ours}


def assert_kept(found: Mapping[str, float]) -> None:
    broken = {name: round(ratio, 2) for name, ratio in found.items() if ratio > RATIO}
    assert not broken, f"RMS error over torch's own: {broken}, allowed {RATIO}"


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize(("m", "draws"), [(1, 40), (2, 30), (7, 20), (64, 8), (300, 4), (4097, 2)])
def test_few_columns(place: str, m: int, draws: int, weight: str) -> None:
    """Short sums over K, N and R, long ones over M."""
    assert_kept(ratios(draws, m=m, n=48, k=40, r=4, weight=weight))


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(("n", "k", "r"), [(130, 144, 8), (32, 2000, 16), (2000, 32, 16)])
def test_many_columns(place: str, m: int, n: int, k: int, r: int) -> None:
    assert_kept(ratios(24 if m < 64 else 3, m=m, n=n, k=k, r=r, weight="nf4"))


def test_very_many_rows(place: str) -> None:
    assert_kept(ratios(1, m=100_000, n=64, k=48, r=4, weight="dense"))


@pytest.mark.parametrize("m", [1, 64, 4097])
def test_nf4_linear(place: str, m: int) -> None:
    assert_kept(ratios(max(2, 24 // m), m=m, n=64, k=1024 if m < 4097 else 64))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [2, 4097])
def test_16_bits(place: str, m: int, dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    assert_kept(ratios(2, m=m, n=48, k=40, r=4, weight="dense", dtype=dtype, adapter_dtype=adapter_dtype))
