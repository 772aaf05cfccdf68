"""Linear layer with a low-rank update in Triton. The formulas are those of reference.py.

Passes over an activation beside those of the frozen layer (its own GEMM forward, and dX), with dropout or without:

    forward    S = (D ∘ x) Aᵀ                       1  x read
               y = x Wᵀ + b + scale · S Bᵀ          0  K-step route      2  β=1 route: y written, read by cuBLAS
    backward   dS / scale = dY B, dB, db            1  dY read
               dA = dSᵀ (D ∘ x)                     1  x read
               dX = dY W + D ∘ (dS A)               0  K-step route      2  β=1 route
    together                                        3                    7

β=1 route: the low-rank term and the bias are summed in float32 and rounded once, cuBLAS adds the base product to them
in its accumulator and rounds once more. K-step route: everything in one accumulator, one rounding; not taken until a
GPU has been measured (runtime/crossovers.py). dS itself is never formed: scale (and keep_scale) multiply float32 sums,
so that operands carry one rounding each. Here `ds` is dS / scale.
An NF4 weight is multiplied by nf4_linear's kernels, which add to the low-rank term likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lora_ops.kernels.lora_linear.operands import Adapter, Grads, Needs
from lora_ops.kernels.lora_linear.triton_gemm import expand, lora_gemm
from lora_ops.kernels.lora_linear.triton_skinny import (
    Dropout,
    reads_once,
    reduce_both,
    reduce_columns,
    reduce_rows,
    scale_argument,
)
from lora_ops.quant.frozen import FrozenTensor, declines_format
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.linear import triton_impl as nf4_linear
from lora_ops.runtime import triton_launch
from lora_ops.runtime.crossovers import crossovers
from lora_ops.runtime.dispatch import as_output
from lora_ops.runtime.triton_launch import on_fma_units

MAX_RANK = 256  # the widest accumulator of a skinny kernel
# Elements of an adapter, whose offsets are 32-bit: with 64 bits a fifth of the kernels takes more registers, up to 85.
MAX_ADAPTER = 2**31
NO_DROPOUT = Dropout.of(0.0, None)


def lora_linear(
    *, x: Tensor, weight: Tensor | FrozenTensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [..., N] in x's dtype and S [..., R] in float32."""
    (n, _), r = weight.shape, adapter.lora_a.shape[0]
    x2 = nf4_linear.as_rows(x)
    bias = None if bias is None else bias.contiguous()
    scale = scale_argument(adapter.scale, x.device)
    s = reduce_rows(x2, _loadable(adapter.lora_a), Dropout.of(adapter.dropout_p, adapter.seed))
    y = _with_base(x2, weight, s, _loadable(adapter.lora_b), bias, scale, NO_DROPOUT, transposed=True)
    return as_output(y, (*x.shape[:-1], n)), as_output(s, (*x.shape[:-1], r))


def lora_linear_backward(
    *,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | FrozenTensor,
    adapter: Adapter,
    needs: Needs,
) -> Grads:
    """dX, dA, dB and db, None where `needs` says so."""
    scale, dropout = scale_argument(adapter.scale, dy.device), Dropout.of(adapter.dropout_p, adapter.seed)
    lora_a, lora_b = _loadable(adapter.lora_a), _loadable(adapter.lora_b)
    a_dtype, b_dtype = adapter.lora_a.dtype, adapter.lora_b.dtype
    dy2 = nf4_linear.as_rows(dy)
    ds = dx = dlora_a = dlora_b = dbias = None
    sum_dtype = dy.dtype if needs.bias else None
    if needs.lora_b and s is not None:
        s2 = nf4_linear.as_rows(s).contiguous()
        if (needs.x or needs.lora_a) and reads_once(dy, lora_b.shape[1]):
            ds, dlora_b, dbias = reduce_both(dy2, lora_b, s2, scale, b_dtype, sum_dtype=sum_dtype)
        else:
            dlora_b, dbias = reduce_columns(dy2, s2, NO_DROPOUT, scale, b_dtype, rank_first=False, sum_dtype=sum_dtype)
    elif needs.bias:
        dbias = dy2.sum(0)  # accumulated in float32 and rounded once by torch
    if ds is None and (needs.x or needs.lora_a):
        ds = reduce_rows(dy2, lora_b.T, NO_DROPOUT)  # [M, N] @ [N, R] -> [M, R]
    if needs.lora_a and x is not None and ds is not None:
        dlora_a, _ = reduce_columns(nf4_linear.as_rows(x), ds, dropout, scale, a_dtype, rank_first=True)
    if needs.x and ds is not None:
        dx = _with_base(dy2, weight, ds, lora_a.T, None, scale, dropout, transposed=False)
        dx = as_output(dx, (*dy.shape[:-1], lora_a.shape[1]))
    return Grads(dx, dlora_a, dlora_b, dbias)


def _with_base(
    x: Tensor,
    weight: Tensor | FrozenTensor,
    s: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    dropout: Dropout,
    *,
    transposed: bool,
) -> Tensor:
    """x W + scale · D ∘ (S Bᵀ) + b, with Wᵀ in the place of W if transposed; s [M, R], lora_b [columns, R]."""
    if isinstance(weight, Tensor):
        w = weight if transposed else weight.T
        if not on_fma_units(x.device, x.dtype) and x.shape[0] >= crossovers(x.device).kstep_min_m:
            return lora_gemm(x, w, s, lora_b, bias, scale, dropout)
        return expand(s, lora_b, bias, scale, dropout, x.dtype).addmm_(x, w.T)
    y = expand(s, lora_b, bias, scale, dropout, x.dtype)
    return nf4_linear.matmul(x, cast(NF4Tensor, weight), transposed=transposed, add_to=y)


def _loadable(t: Tensor) -> Tensor:
    """lora_a or lora_b as kernels load it: not of float64, which autocast may bring, and within 32-bit offsets."""
    if t.dtype == torch.float64:
        t = t.float()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t if reach < 2**31 else t.contiguous()


def declines(op: str, lead: Tensor, *, weight: Tensor | FrozenTensor, adapter: Adapter, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    rank = adapter.lora_a.shape[0]
    if rank > MAX_RANK:
        return f"lora_linear's Triton kernels take ranks up to {MAX_RANK}, not {rank}"
    for name, t in (("lora_a", adapter.lora_a), ("lora_b", adapter.lora_b)):
        if t.numel() > MAX_ADAPTER:
            return f"{name}: lora_linear's Triton kernels take up to 2^31 elements, not {tuple(t.shape)}"
    return declines_format(weight, "nf4", backend="triton") or triton_launch.declines(
        lead.device, lead.dtype, products=True
    )


IMPLS: dict[str, Callable] = {"lora_linear": lora_linear, "lora_linear_backward": lora_linear_backward}
