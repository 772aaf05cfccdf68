"""Linear layer with a low-rank update in Triton. The formulas are those of reference.py.

Passes over an activation beside those of the frozen layer (its own GEMM forward, and dX), with dropout or without:

    forward    S = (D ∘ x) Aᵀ                       1  x read
               y = x Wᵀ + b + scale · S Bᵀ          0  K-step route      2  β=1 route: y written, read by cuBLAS
    backward   T = dY B, dB, db                     1  dY read
               dA = scale · Tᵀ (D ∘ x)              1  x read
               dX = dY W + scale · D ∘ (T A)        0  K-step route      2  β=1 route
    together                                        3                    7

β=1 route: the low-rank term and the bias are summed in float32 and rounded once, cuBLAS adds the base product to them
in its accumulator and rounds once more. K-step route: everything in one accumulator, one rounding. dS = scale · T is
never formed: scale (and keep_scale) multiply float32 sums, so that operands carry one rounding each.
An NF4 weight is multiplied by nf4_linear's kernels, which add to the low-rank term likewise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_ops.kernels.lora_linear.reference import Grads, Needs
from lora_ops.kernels.lora_linear.triton_gemm import expand, lora_gemm
from lora_ops.kernels.lora_linear.triton_skinny import (
    Dropout,
    padded_rank,
    reads_once,
    reduce_both,
    reduce_columns,
    reduce_rows,
    scale_argument,
)
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4_linear import triton_impl as nf4
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.crossovers import crossovers, force
from lora_ops.runtime.dispatch import as_output
from lora_ops.runtime.triton_launch import HMMA, MMA, ODD_ROWS, Expect, GateCase

MAX_RANK = 256  # the widest accumulator of a skinny kernel
# Elements of an adapter, whose offsets are 32-bit: with 64 bits a fifth of the kernels takes more registers, up to 85.
MAX_ADAPTER = 2**31
NO_DROPOUT = Dropout.of(0.0, None)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [..., N] in x's dtype and S [..., R] in float32."""
    (n, _), r = weight.shape, lora_a.shape[0]
    x2 = nf4.as_rows(x)
    bias = None if bias is None else bias.contiguous()
    factor = scale_argument(scale, x.device)
    s = reduce_rows(x2, _adapter(lora_a), Dropout.of(dropout_p, seed))
    y = _with_base(x2, weight, s, _adapter(lora_b).T, bias, factor, NO_DROPOUT, transposed=True)
    return as_output(y, (*x.shape[:-1], n)), as_output(s, (*x.shape[:-1], r))


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    needs_x, needs_a, needs_b, needs_bias = needs
    factor, dropout = scale_argument(scale, dy.device), Dropout.of(dropout_p, seed)
    a, b = _adapter(lora_a), _adapter(lora_b)
    dy2 = nf4.as_rows(dy)
    t = dx = da = db = dbias = None
    sum_dtype = dy.dtype if needs_bias else None
    if needs_b and s is not None:
        s2 = nf4.as_rows(s).contiguous()
        if (needs_x or needs_a) and reads_once(dy.dtype, b.shape[1]):
            t, db, dbias = reduce_both(dy2, b.T, s2, factor, lora_b.dtype, sum_dtype=sum_dtype)
        else:
            db, dbias = reduce_columns(
                dy2, s2, NO_DROPOUT, factor, lora_b.dtype, rank_first=False, sum_dtype=sum_dtype
            )  # fmt: skip
    elif needs_bias:
        dbias = dy2.sum(0)  # accumulated in float32 and rounded once by torch
    if t is None and (needs_x or needs_a):
        t = reduce_rows(dy2, b.T, NO_DROPOUT)  # [M, N] @ [N, R] -> [M, R]
    if needs_a and x is not None and t is not None:
        da, _ = reduce_columns(nf4.as_rows(x), t, dropout, factor, lora_a.dtype, rank_first=True)
    if needs_x and t is not None:
        dx = _with_base(dy2, weight, t, a, None, factor, dropout, transposed=False)
        dx = as_output(dx, (*dy.shape[:-1], a.shape[1]))
    return dx, da, db, dbias


def _with_base(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    t: Tensor,
    low: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    dropout: Dropout,
    *,
    transposed: bool,
) -> Tensor:
    """x W + scale · D ∘ (T L) + b, with Wᵀ in the place of W if transposed; x [M, *], t [M, R], low [R, *]."""
    if isinstance(weight, Tensor):
        w = weight.T if transposed else weight
        if x.dtype != torch.float32 and x.shape[0] >= crossovers(x.device).kstep_min_m:
            return lora_gemm(x, w, t, low, bias, scale, dropout)
        return expand(t, low, bias, scale, dropout, x.dtype).addmm_(x, w)
    y = expand(t, low, bias, scale, dropout, x.dtype)
    return nf4.matmul(x, weight, transposed=transposed, add_to=y)


def _adapter(t: Tensor) -> Tensor:
    """lora_a or lora_b as kernels load it: not of float64, which autocast may bring, and within 32-bit offsets."""
    if t.dtype == torch.float64:
        t = t.float()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t if reach < 2**31 else t.contiguous()


def declines(op: str, lead: Tensor, *args: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    first = 1 if op == "lora_linear" else 3
    adapter = dict(zip(("lora_a", "lora_b"), args[first : first + 2], strict=True))
    rank = adapter["lora_a"].shape[0]
    if rank > MAX_RANK:
        return f"lora_linear's Triton kernels take ranks up to {MAX_RANK}, not {rank}"
    for name, t in adapter.items():
        if t.numel() > MAX_ADAPTER:
            return f"{name}: lora_linear's Triton kernels take up to 2^31 elements, not {tuple(t.shape)}"
    return nf4.declines(op, lead)


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}


def _gate_call(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, p: float, *, kstep: bool, needs: Needs, gap: int = 0
) -> None:
    """Forward and backward on tensors that only have shapes; with a bias if its gradient is needed.

    `gap` elements lie between the rows of x, and between those of dY.
    """

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = meta(m, k + gap, dtype=dtype)[:, :k], meta(m, n + gap, dtype=dtype)[:, :n]
    w = meta(n, k, dtype=dtype)
    adapter = meta(r, k), meta(n, r), torch.tensor(2.0)
    bias = meta(n, dtype=dtype) if needs[3] else None
    seed = meta(dtype=torch.int64) if p else None
    with force(kstep_min_m=0 if kstep else 2**62):
        _, s = lora_linear(x, w, *adapter, bias, p, seed)
        lora_linear_backward(dy, x, s, w, *adapter, p, seed, needs)


# Of a size Triton sees whether it is a multiple of 16, so that these stand for all of their kind.
ALIGNED, ODD, ODD_N, ODD_K = (4096, 4096), (4097, 4095), (4097, 4096), (4096, 4095)
SIZES = {ALIGNED: "", ODD: " odd N and K", ODD_N: " odd N", ODD_K: " odd K"}


def _expected(r: int, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, Expect]:
    """By kernel."""
    if dtype == torch.float32:
        return {}
    padded, odd_rank = padded_rank(r), r % 16 != 0
    # x and W have rows of K elements, dY of N; `gate` lists one of them odd only for ranks that read dY in reduce_both.
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


def gate() -> Iterator[GateCase]:
    """Every tile, with and without dropout; every dtype; odd sizes; tensors of more than 2^31 elements."""
    every, no_bias, frozen_b = (True, True, True, True), (True, True, True, False), (True, True, False, False)
    # Each tile, and each where R is no multiple of 16: of a rank, Triton sees only whether it is one, or 1.
    ranks = 16, 32, 64, 128, 256, 8, 24, 40, 100, 200
    cases = [(r, torch.bfloat16, p, every) for r in ranks for p in (0.0, 0.1)]
    cases += [(r, torch.bfloat16, 0.0, no_bias) for r in ranks]
    cases += [(4, torch.bfloat16, 0.1, every)]
    cases += [(r, torch.float32, 0.1, every) for r in (8, 16, 64, 128, 200, 256)]
    cases += [(16, torch.float16, 0.1, every), (16, torch.bfloat16, 0.1, frozen_b)]
    sized = [(case, size) for size in (ALIGNED, ODD) for case in cases]
    sized += [((r, torch.bfloat16, p, every), size) for size in (ODD_N, ODD_K) for r in (16, 8) for p in (0.0, 0.1)]
    for (r, dtype, p, needs), size in sized:
        for kstep in (False, True) if dtype != torch.float32 and needs != frozen_b else (False,):
            name = f"r{r} {dtype_name(dtype)}" + f" p={p}" * bool(p) + " K-step" * kstep
            name += {every: "", no_bias: " no bias", frozen_b: " frozen B"}[needs] + SIZES[size]
            call = functools.partial(_gate_call, 8192, *size, r, dtype, p, kstep=kstep, needs=needs)
            yield GateCase(name, call, _expected(r, dtype, size))
    for r, p, kstep in itertools.product((16, 8), (0.0, 0.1), (False, True)):
        call = functools.partial(_gate_call, 8192, *ALIGNED, r, torch.bfloat16, p, kstep=kstep, needs=every, gap=1)
        yield GateCase(f"r{r} p={p} odd row strides" + " K-step" * kstep, call, _expected(r, torch.bfloat16, ODD))
    for kstep in (False, True):
        call = functools.partial(
            _gate_call, 600_000, 4096, 4096, 16, torch.bfloat16, 0.1, kstep=kstep, needs=every
        )  # fmt: skip
        yield GateCase("M · K > 2^31" + " K-step" * kstep, call, huge=True)
