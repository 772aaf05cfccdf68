"""Linear layer over an NF4 weight in Triton: three routes by the number of tokens M, see runtime/crossovers.py.

M <= 4      GEMV: decode in registers, fp32 products                                   W read once, packed
M <= ~256   GEMM that decodes each tile in its loop; dX reads the same bytes           W read once a block of tokens
larger      decode W to a temporary of the activations' dtype, multiply by cuBLAS      4.5 + 16 + 16 bits a weight
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor
from lora_ops.quant.nf4_codec import triton_impl as codec
from lora_ops.quant.nf4_linear.triton_gemm import MAX_GEMV_M, aligned, nf4_gemm, nf4_gemv
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.crossovers import crossovers
from lora_ops.runtime.dispatch import as_output
from lora_ops.runtime.triton_launch import HMMA, MMA, ODD_ROWS, Expect, GateCase, declines_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    bias = None if bias is None else bias.contiguous()
    return as_output(matmul(as_rows(x), q, transposed=True, bias=bias), (*x.shape[:-1], q.shape[0]))


def nf4_linear_dx(dy: Tensor, q: NF4Tensor) -> Tensor:
    """dy [..., N], q (N, K) -> dX [..., K]."""
    return as_output(matmul(as_rows(dy), q, transposed=False), (*dy.shape[:-1], q.shape[1]))


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with unit stride along K: a view, or a copy where that is impossible.

    Kernels take any stride between rows but load 16 bytes of a row at a time, so a row must be contiguous.
    """
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def matmul(
    x: Tensor, q: NF4Tensor, *, transposed: bool, bias: Tensor | None = None, add_to: Tensor | None = None
) -> Tensor:
    """x W + b + add_to, with Wᵀ in the place of W if transposed.

    Args:
        x: [M, K] (transposed) or [M, N], unit stride along the last dimension.
        q: (N, K).
        bias: [N] or [K], contiguous, or None.
        add_to: of the result's shape, contiguous, or None; without bias. May be overwritten.

    Returns:
        [M, N] (transposed) or [M, K], in x's dtype.
    """
    limits, m = crossovers(x.device), x.shape[0]
    if transposed and 0 < m <= min(limits.nf4_gemv_max_m, MAX_GEMV_M) and aligned(q):
        return nf4_gemv(x, q, bias, add_to)
    if m <= limits.nf4_gemm_max_m:
        return nf4_gemm(x, q, bias, add_to, transposed=transposed)
    w = codec.dequantize_nf4(q, x.dtype)
    if transposed:
        w = w.T
    if add_to is not None:
        return add_to.addmm_(x, w)
    return x @ w if bias is None else torch.addmm(bias, x, w)


def declines(op: str, lead: Tensor, *args: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if lead.dtype not in DTYPES:
        return f"triton kernels have no {dtype_name(lead.dtype)}"
    return declines_device(lead.device)


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear, "nf4_linear_dx": nf4_linear_dx}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_nf4(n: int, k: int, block_size: int, nested: bool) -> NF4Tensor:
    n_blocks = -(-n * k // block_size)
    packed = _meta((n * k + 1) // 2, 1, dtype=torch.uint8)
    if not nested:
        return NF4Tensor(packed, _meta(n_blocks, dtype=torch.float32), (n, k), torch.bfloat16, block_size)
    groups = _meta(-(-n_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32)
    absmax, offset = _meta(n_blocks, dtype=torch.uint8), _meta(dtype=torch.float32)
    return NF4Tensor(packed, absmax, (n, k), torch.bfloat16, block_size, groups, offset)


# Of a size Triton sees whether it is a multiple of 16, the launcher whether rows hold whole blocks.
ALIGNED, ODD_N, ODD, ODD_K = (4096, 4096), (4097, 4096), (4097, 4095), (4096, 4095)
SIZES = {ALIGNED: "", ODD_N: " odd N", ODD: " odd N and K", ODD_K: " odd K"}


def _expected(m: int, size: tuple[int, int], dtype: torch.dtype, *, transposed: bool) -> dict[str, Expect]:
    """By kernel."""
    n, k = size
    wgmma = k % 16 == 0 if transposed else m >= 64  # which takes 64 rows: of W, 32 where they are ragged, or tokens
    mma = {} if dtype == torch.float32 else MMA if wgmma else HMMA
    wide = "load" if m > 16 else ""  # up to 16 tokens a tile is 8 bytes a thread of gfx942's 256
    if k % 16 or (n % 16 and not transposed):  # dX of an odd N: rows of dY are odd, those of W are not
        wide = ODD_ROWS
    return {"_nf4_gemv_kernel": Expect(wide=wide), "_nf4_gemm_kernel": Expect(mma=mma, wide=wide)}


def gate() -> Iterator[GateCase]:
    """Every tile of both directions; nested and plain scales; block sizes around the tile; rows that share blocks; odd
    sizes; what joins the sum: nothing, a bias, or lora_linear's low-rank term."""
    for size, m, dtype in itertools.product((ALIGNED, ODD_N, ODD), (1, 2, 4, 16, 32, 64, 128), DTYPES):
        if size != ALIGNED and dtype == torch.float16:
            continue  # differs from bfloat16 in one instruction
        for nested in (False, True) if dtype != torch.float32 else (False,):
            q, x, dy = _meta_nf4(*size, 64, nested), _meta(m, size[1], dtype=dtype), _meta(m, size[0], dtype=dtype)
            name = f"M={m} {dtype_name(dtype)}" + " nested" * nested + SIZES[size]
            call = functools.partial(matmul, x, q, transposed=True)
            yield GateCase(f"y {name}", call, _expected(m, size, dtype, transposed=True))
            if m >= 16:
                call = functools.partial(matmul, dy, q, transposed=False)
                yield GateCase(f"dX {name}", call, _expected(m, size, dtype, transposed=False))
    for m, size, block_size in (
        (1, ALIGNED, 32),
        (1, ALIGNED, 4096),
        (64, ALIGNED, 4096),
        (64, (4096, 4100), 64),
        (1, ODD_N, 32),
        (1, ODD_N, 4096),
        (64, ODD_N, 32),
        (64, ODD_N, 4096),
        (64, ODD_K, 64),
        (64, (4096, 4112), 64),
        (64, (4097, 4112), 64),
    ):
        n, k = size
        x, q = _meta(m, k, dtype=torch.bfloat16), _meta_nf4(n, k, block_size, nested=True)
        call = functools.partial(matmul, x, q, transposed=True, bias=_meta(n, dtype=torch.bfloat16))
        yield GateCase(f"y M={m} K={k} b{block_size}{' odd N' * (n % 2)}", call)
    yield from _joined()
    for m in (1, 16, 32, 64, 128):
        x, q = _meta(m, 4097, dtype=torch.bfloat16)[:, :4096], _meta_nf4(*ALIGNED, 64, nested=True)
        for name, transposed in (("y", True), ("dX", False)) if m > MAX_GEMV_M else (("y", True),):
            call = functools.partial(matmul, x, q, transposed=transposed)
            expect = _expected(m, ALIGNED, torch.bfloat16, transposed=transposed)
            yield GateCase(f"{name} M={m} odd row strides", call, expect)
    huge = _meta_nf4(600_000, 8192, 64, nested=True)
    for m in (1, 64):
        x = _meta(m, 8192, dtype=torch.bfloat16)
        yield GateCase(f"y M={m} N · K > 2^32", functools.partial(matmul, x, huge, transposed=True), huge=True)


def _joined() -> Iterator[GateCase]:
    """A bias, or lora_linear's low-rank term, joined to the sums of every tile; sums that are split, and whole ones."""
    dtype = torch.bfloat16
    long = 4 * ALIGNED[0]  # as many columns of the output fill the chip: no sum is split
    ms = {False: (1, 2, 4, 16), True: (16, 32, 64, 128)}  # split sums are joined by a kernel that knows no tile
    for whole, (odd_n, odd_k) in itertools.product((False, True), ((False, False), (True, False), (True, True))):
        for m, transposed, join in itertools.product(ms[whole], (True, False), ("", " + b", " + add")):
            if (m <= MAX_GEMV_M and (odd_k or not transposed)) or (join == " + b" and not transposed):
                continue
            if not whole and not join:
                continue
            shape = [ALIGNED[0] + odd_n, ALIGNED[1] - odd_k]
            if whole:
                shape[not transposed] = long + (odd_n if transposed else -odd_k)
            x, j = (_meta(m, shape[transposed], dtype=dtype), shape[not transposed])
            bias = _meta(j, dtype=dtype) if join == " + b" else None
            add = _meta(m, j, dtype=dtype) if join == " + add" else None
            q = _meta_nf4(shape[0], shape[1], 64, nested=True)
            call = functools.partial(matmul, x, q, transposed=transposed, bias=bias, add_to=add)
            name = f"{'y' if transposed else 'dX'}{join} M={m}" + " whole sums" * whole
            size = ALIGNED[0] + odd_n, ALIGNED[1] - odd_k
            yield GateCase(name + SIZES[size], call, _expected(m, size, dtype, transposed=transposed))
