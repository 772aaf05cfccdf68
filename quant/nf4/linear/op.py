"""Linear layer over an NF4 weight: schemas, shape rules, gradient formula and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.frozen import N_OPERANDS, OPERANDS_SCHEMA, from_operands, operands
from lora_ops.quant.nf4 import NF4Tensor, check_nf4
from lora_ops.runtime.checks import (
    FLOAT_DTYPES,
    autocasting,
    check_dtype,
    check_last_dim,
    check_same_device,
    check_shape,
)
from lora_ops.runtime.dispatch import Op
from lora_ops.runtime.plain_call import is_plain_call

_fwd = Op(f"nf4_linear(Tensor x, Tensor? bias, {OPERANDS_SCHEMA}) -> Tensor", __package__)
_dx = Op(f"nf4_linear_dx(Tensor dy, {OPERANDS_SCHEMA}) -> Tensor", __package__)


@_fwd.kernel
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return _fwd.run(x, x=x, q=from_operands(x.dtype, *weight), bias=bias)


@_fwd.fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    shape = weight[4]
    return x.new_empty((*x.shape[:-1], shape[0]))


@_fwd.autocast
def _(dtype: torch.dtype, x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    if x.dtype == torch.float64:  # as autocast treats F.linear
        dtype = torch.float64
    return torch.ops.lora_ops.nf4_linear(x.to(dtype), None if bias is None else bias.to(dtype), *weight)


@_dx.kernel
def _(dy: Tensor, *weight: Any) -> Tensor:
    return _dx.run(dy, dy=dy, q=from_operands(dy.dtype, *weight))


@_dx.fake
def _(dy: Tensor, *weight: Any) -> Tensor:
    shape = weight[4]
    return dy.new_empty((*dy.shape[:-1], shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *weight = inputs
    *tensors, ctx.shape, ctx.layout = weight
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY · W, dbias = Σ_m dY."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lora_ops.nf4_linear_dx(dy, *ctx.saved_tensors, ctx.shape, ctx.layout)
    if ctx.needs_input_grad[1]:
        # torch sums 16-bit tensors in float32 and rounds once.
        dbias = dy.sum(tuple(range(dy.dim() - 1)), dtype=ctx.bias_dtype) if dy.dim() > 1 else dy.clone()
    return dx, dbias, *(None,) * N_OPERANDS


_fwd.autograd(_backward, _setup_context)
_dx.not_differentiable()


def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer over a quantized, frozen weight: y = x Wᵀ + b with W = dequantize(q).

    W is decoded in the dtype of x (code · absmax in float32, rounded once); products accumulate in float32. Never is a
    dense copy of W kept for the backward, which decodes it again. Differentiable in x and bias. Under autocast x and
    bias are cast as F.linear casts them.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        q: NF4Tensor of shape (N, K).
        bias: [N], same dtype as x (any floating dtype under autocast), or None.

    Returns:
        [..., N] in the dtype of x, or in that of autocast.

    Raises:
        TypeError, ValueError: if a dtype, shape or device does not fit.

    Source: QLoRA (Dettmers et al. 2023), equation 5 without the adapter.
    """
    check_nf4("q", q, dim=2)
    n, k = q.shape
    check_dtype("x", x, FLOAT_DTYPES)
    check_last_dim("x", x, k)
    if bias is not None:
        check_dtype("bias", bias, FLOAT_DTYPES if autocasting(x) else (x.dtype,))
        check_shape("bias", bias, N=n)
    check_same_device(x=x, q=q.packed, bias=bias)
    if is_plain_call(x, q.packed, bias):
        return _fwd.run(x, x=x, q=q, bias=bias)
    return torch.ops.lora_ops.nf4_linear(x, bias, *operands(q))
