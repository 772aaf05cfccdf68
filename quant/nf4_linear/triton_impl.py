"""Linear layer over an NF4 weight in Triton: three routes by the number of tokens M, see quant/crossovers.py.

M <= 4      GEMV: decode in registers, fp32 products                                   W read once, packed
M <= ~256   GEMM that decodes each tile in its loop; dX reads the same bytes           W read once a block of tokens
larger      decode W to a temporary of the activations' dtype, multiply by cuBLAS      4.5 + 16 + 16 bits a weight
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_ops._checks import dtype_name
from lora_ops._triton import HMMA, MMA, Expect, GateCase, declines_device
from lora_ops.quant.crossovers import crossovers
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor
from lora_ops.quant.nf4_codec import triton_impl as codec
from lora_ops.quant.nf4_linear.triton_gemm import MAX_GEMV_M, aligned, nf4_gemm, nf4_gemv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    bias = None if bias is None else bias.contiguous()
    return matmul(as_rows(x), q, transposed=True, bias=bias).view(*x.shape[:-1], q.shape[0])


def nf4_linear_dx(dy: Tensor, q: NF4Tensor) -> Tensor:
    """dy [..., N], q (N, K) -> dX [..., K]."""
    return matmul(as_rows(dy), q, transposed=False).view(*dy.shape[:-1], q.shape[1])


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


def gate() -> Iterator[GateCase]:
    """Every tile of both directions; nested and plain scales; block sizes around the tile; rows that share blocks."""
    gemv, gemm = "_nf4_gemv_kernel", "_nf4_gemm_kernel"
    for m in (1, 2, 4, 16, 32, 64, 128):
        for dtype in DTYPES:
            for nested in (False, True) if dtype != torch.float32 else (False,):
                q = _meta_nf4(4096, 4096, 64, nested)
                name = f"M={m} {dtype_name(dtype)}" + " nested" * nested
                mma = {} if dtype == torch.float32 else MMA
                wide = "load" if m > 16 else ""  # up to 16 tokens a tile is 8 bytes a thread of gfx942's 256
                expect = {gemv: Expect(wide=wide), gemm: Expect(mma=mma, wide=wide)}
                x = _meta(m, 4096, dtype=dtype)
                yield GateCase(f"y {name}", functools.partial(matmul, x, q, transposed=True), expect)
                if m >= 16:
                    expect = {gemm: Expect(mma=(MMA if m >= 64 else HMMA) if mma else {}, wide=wide)}
                    yield GateCase(f"dX {name}", functools.partial(matmul, x, q, transposed=False), expect)
    for m, n, k, block_size in (
        (1, 4096, 4096, 32),
        (1, 4096, 4096, 4096),
        (64, 4096, 4096, 4096),
        (64, 4096, 4100, 64),
    ):
        x, q = _meta(m, k, dtype=torch.bfloat16), _meta_nf4(n, k, block_size, nested=True)
        call = functools.partial(matmul, x, q, transposed=True, bias=_meta(n, dtype=torch.bfloat16))
        yield GateCase(f"y M={m} K={k} b{block_size}", call)
    huge = _meta_nf4(600_000, 8192, 64, nested=True)
    for m in (1, 64):
        x = _meta(m, 8192, dtype=torch.bfloat16)
        yield GateCase(f"y M={m} N · K > 2^32", functools.partial(matmul, x, huge, transposed=True), huge=True)
