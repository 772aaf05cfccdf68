"""Linear layer over an NF4 weight in Triton: three routes by the number of tokens M, see runtime/crossovers.py.

M <= 4      GEMV: decode in registers, fp32 products                                   W read once, packed
M <= ~256   GEMM that decodes each tile in its loop; dX reads the same bytes           W read once a block of tokens
larger      decode W to a temporary of the activations' dtype, multiply by cuBLAS      4.5 + 16 + 16 bits a weight
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.codec import triton_impl as codec
from lora_ops.quant.nf4.linear.triton_gemm import MAX_GEMV_M, aligned, nf4_gemm, nf4_gemv
from lora_ops.runtime import triton_launch
from lora_ops.runtime.crossovers import crossovers
from lora_ops.runtime.dispatch import as_output


def nf4_linear(*, x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    bias = None if bias is None else bias.contiguous()
    return as_output(matmul(as_rows(x), q, transposed=True, bias=bias), (*x.shape[:-1], q.shape[0]))


def nf4_linear_dx(*, dy: Tensor, q: NF4Tensor) -> Tensor:
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


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return triton_launch.declines(lead.device, lead.dtype, products=True)


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear, "nf4_linear_dx": nf4_linear_dx}
