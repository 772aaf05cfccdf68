"""Linear layer over an NF4 weight: the GEMV and the GEMM that decode in their loops.

Every tile of both directions; nested and plain scales; block sizes around the tile; rows that share blocks; odd sizes;
what joins the sum: nothing, a bias, or lora_linear's low-rank term.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

from lora_ops.quant.nf4.linear import triton_impl
from lora_ops.quant.nf4.linear.triton_gemm import MAX_GEMV_M
from lora_ops.runtime import triton_launch
from lora_ops.runtime.checks import dtype_name
from tests.gpu_proof.expect import FMA, HMMA, MMA, ODD_ROWS, Expect, GateCase, meta, meta_nf4, served

# Of a size Triton sees whether it is a multiple of 16, the launcher whether rows hold whole blocks.
ALIGNED, ODD_N, ODD, ODD_K = (4096, 4096), (4097, 4096), (4097, 4095), (4096, 4095)
SIZES = {ALIGNED: "", ODD_N: " odd N", ODD: " odd N and K", ODD_K: " odd K"}


def _expected(
    m: int, size: tuple[int, int], dtype: torch.dtype, chips: frozenset[str], *, transposed: bool
) -> dict[str, Expect]:
    """By kernel."""
    n, k = size
    wgmma = k % 16 == 0 if transposed else m >= 64  # which takes 64 rows: of W, 32 where they are ragged, or tokens
    mma = {} if dtype == torch.float32 or chips == FMA else MMA if wgmma else HMMA
    wide = "load" if m > 16 else ""  # up to 16 tokens a tile is 8 bytes a thread of gfx942's 256
    if k % 16 or (n % 16 and not transposed):  # dX of an odd N: rows of dY are odd, those of W are not
        wide = ODD_ROWS
    return {"_nf4_gemv_kernel": Expect(wide=wide), "_nf4_gemm_kernel": Expect(mma=mma, wide=wide)}


def cases() -> Iterator[GateCase]:
    for size, m, listed in itertools.product((ALIGNED, ODD_N, ODD), (1, 2, 4, 16, 32, 64, 128), triton_launch.DTYPES):
        if size != ALIGNED and listed == torch.float16:
            continue  # differs from bfloat16 in one instruction
        for (dtype, chips, end), nested in itertools.product(served(listed), (False, True)):
            if nested and dtype == torch.float32:
                continue
            q, x, dy = meta_nf4(*size, nested=nested), meta(m, size[1], dtype=dtype), meta(m, size[0], dtype=dtype)
            name = f"M={m} {dtype_name(dtype)}" + " nested" * nested + SIZES[size] + end
            call = functools.partial(triton_impl.matmul, x, q, transposed=True)
            yield GateCase(f"y {name}", call, _expected(m, size, dtype, chips, transposed=True), chips=chips)
            if m >= 16:
                call = functools.partial(triton_impl.matmul, dy, q, transposed=False)
                yield GateCase(f"dX {name}", call, _expected(m, size, dtype, chips, transposed=False), chips=chips)
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
        (n, k), odd = size, " odd N" * (size[0] % 2)
        for dtype, chips, end in served(torch.bfloat16):
            x, q = meta(m, k, dtype=dtype), meta_nf4(n, k, block_size=block_size, nested=True)
            call = functools.partial(triton_impl.matmul, x, q, transposed=True, bias=meta(n, dtype=dtype))
            yield GateCase(f"y M={m} K={k} b{block_size}{odd}{end}", call, chips=chips)
    for dtype, chips, end in served(torch.bfloat16):
        yield from _joined(dtype, chips, end)
    for m, (dtype, chips, end) in itertools.product((1, 16, 32, 64, 128), served(torch.bfloat16)):
        x, q = meta(m, 4097, dtype=dtype)[:, :4096], meta_nf4(*ALIGNED, nested=True)
        for name, transposed in (("y", True), ("dX", False)) if m > MAX_GEMV_M else (("y", True),):
            call = functools.partial(triton_impl.matmul, x, q, transposed=transposed)
            expect = _expected(m, ALIGNED, dtype, chips, transposed=transposed)
            yield GateCase(f"{name} M={m} odd row strides{end}", call, expect, chips=chips)
    huge = meta_nf4(600_000, 8192, nested=True)
    for m, (dtype, chips, end) in itertools.product((1, 64), served(torch.bfloat16)):
        x = meta(m, 8192, dtype=dtype)
        call = functools.partial(triton_impl.matmul, x, huge, transposed=True)
        yield GateCase(f"y M={m} N · K > 2^32{end}", call, huge=True, chips=chips)


def _joined(dtype: torch.dtype, chips: frozenset[str], end: str) -> Iterator[GateCase]:
    """A bias, or lora_linear's low-rank term, joined to the sums of every tile; sums that are split, and whole ones."""
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
            x, j = (meta(m, shape[transposed], dtype=dtype), shape[not transposed])
            bias = meta(j, dtype=dtype) if join == " + b" else None
            add = meta(m, j, dtype=dtype) if join == " + add" else None
            q = meta_nf4(*shape, nested=True)
            call = functools.partial(triton_impl.matmul, x, q, transposed=transposed, bias=bias, add_to=add)
            name = f"{'y' if transposed else 'dX'}{join} M={m}" + " whole sums" * whole
            size = ALIGNED[0] + odd_n, ALIGNED[1] - odd_k
            expect = _expected(m, size, dtype, chips, transposed=transposed)
            yield GateCase(name + SIZES[size] + end, call, expect, chips=chips)
