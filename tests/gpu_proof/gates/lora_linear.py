"""Linear layer with a low-rank update, forward and backward.

Every tile, with and without dropout; every dtype; odd sizes; tensors of more than 2^31 elements.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

from lora_ops.kernels.lora_linear import triton_impl
from lora_ops.kernels.lora_linear.operands import Adapter, Needs
from lora_ops.kernels.lora_linear.triton_skinny import padded_rank
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.crossovers import force
from tests.gpu_proof.expect import FMA, HMMA, MMA, ODD_ROWS, Expect, GateCase, meta, served

# Of a size Triton sees whether it is a multiple of 16, so that these stand for all of their kind.
ALIGNED, ODD, ODD_N, ODD_K = (4096, 4096), (4097, 4095), (4097, 4096), (4096, 4095)
SIZES = {ALIGNED: "", ODD: " odd N and K", ODD_N: " odd N", ODD_K: " odd K"}


def _expected(r: int, dtype: torch.dtype, size: tuple[int, int], chips: frozenset[str]) -> dict[str, Expect]:
    """By kernel."""
    if dtype == torch.float32 or chips == FMA:
        return {}
    padded, odd_rank = padded_rank(r), r % 16 != 0
    # x and W have rows of K elements, dY of N; one of them alone is odd only for ranks that read dY in reduce_both.
    of_dy, of_x = ("load" if columns % 16 == 0 else ODD_ROWS for columns in size)
    few_rows = (padded == 32 and of_x) or (padded == 256 and (odd_rank or not of_x))
    return {
        "_reduce_rows_kernel": Expect(
            mma=HMMA if few_rows else MMA,
            # Of rank 100 gfx942 loads the tile of x with 8 bytes a lane, and the adapter by the element.
            wide=of_x if padded < (128 if odd_rank else 256) else "",
        ),
        "_reduce_columns_kernel": Expect(mma=MMA if padded >= 64 else HMMA, wide=of_x if padded < 256 else ""),
        "_reduce_both_kernel": Expect(mma=HMMA, wide=of_dy),
        "_expand_kernel": Expect(mma=MMA),  # 16-byte stores on NVIDIA, 8 bytes on gfx942, as its products lie
        "_lora_gemm_kernel": Expect(mma=MMA, wide=of_x and of_dy),
    }


def cases() -> Iterator[GateCase]:
    every, no_bias = Needs(True, True, True, True), Needs(True, True, True, False)
    frozen_b = Needs(True, True, False, False)
    # Each tile, and each where R is no multiple of 16: of a rank, Triton sees only whether it is one, or 1.
    ranks = 16, 32, 64, 128, 256, 8, 24, 40, 100, 200
    configs = [(r, torch.bfloat16, p, every) for r in ranks for p in (0.0, 0.1)]
    configs += [(r, torch.bfloat16, 0.0, no_bias) for r in ranks]
    configs += [(4, torch.bfloat16, 0.1, every)]
    configs += [(r, torch.float32, 0.1, every) for r in (8, 16, 64, 128, 200, 256)]
    configs += [(16, torch.float16, 0.1, every), (16, torch.bfloat16, 0.1, frozen_b)]
    sized = [(config, size) for size in (ALIGNED, ODD) for config in configs]
    sized += [((r, torch.bfloat16, p, every), size) for size in (ODD_N, ODD_K) for r in (16, 8) for p in (0.0, 0.1)]
    for ((r, listed, p, needs), size), kstep in itertools.product(sized, (False, True)):
        if kstep and (listed == torch.float32 or needs == frozen_b):
            continue
        for dtype, chips, end in _served(listed, kstep=kstep):
            name = f"r{r} {dtype_name(dtype)}" + f" p={p}" * bool(p) + " K-step" * kstep
            name += {every: "", no_bias: " no bias", frozen_b: " frozen B"}[needs] + SIZES[size] + end
            run = functools.partial(call, 8192, *size, r, dtype, p, kstep=kstep, needs=needs)
            yield GateCase(name, run, _expected(r, dtype, size, chips), chips=chips)
    for r, p, kstep in itertools.product((16, 8), (0.0, 0.1), (False, True)):
        for dtype, chips, end in _served(torch.bfloat16, kstep=kstep):
            run = functools.partial(call, 8192, *ALIGNED, r, dtype, p, kstep=kstep, needs=every, gap=1)
            expect = _expected(r, dtype, ODD, chips)
            yield GateCase(f"r{r} p={p} odd row strides" + " K-step" * kstep + end, run, expect, chips=chips)
    for kstep in (False, True):
        for dtype, chips, end in _served(torch.bfloat16, kstep=kstep):
            run = functools.partial(call, 600_000, *ALIGNED, 16, dtype, 0.1, kstep=kstep, needs=every)
            yield GateCase("M · K > 2^31" + " K-step" * kstep + end, run, huge=True, chips=chips)


def _served(dtype: torch.dtype, *, kstep: bool) -> Iterator[tuple[torch.dtype, frozenset[str], str]]:
    """As `served`; the K-step route is one of matrix instructions."""
    return (case for case in served(dtype) if case[1] != FMA or not kstep)


def call(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, p: float, *, kstep: bool, needs: Needs, gap: int = 0
) -> None:
    """Forward and backward on tensors that only have shapes; with a bias if its gradient is needed.

    `gap` elements lie between the rows of x, and between those of dY.
    """
    x, dy = meta(m, k + gap, dtype=dtype)[:, :k], meta(m, n + gap, dtype=dtype)[:, :n]
    w = meta(n, k, dtype=dtype)
    adapter = Adapter(meta(r, k), meta(n, r), torch.tensor(2.0), p, meta(dtype=torch.int64) if p else None)
    bias = meta(n, dtype=dtype) if needs.bias else None
    with force(kstep_min_m=0 if kstep else 2**62):
        _, s = triton_impl.lora_linear(x=x, weight=w, adapter=adapter, bias=bias)
        triton_impl.lora_linear_backward(dy=dy, x=x, s=s, weight=w, adapter=adapter, needs=needs)
