"""Linear layer over a frozen weight: schemas, shape rules, gradient formula and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.frozen import N_OPERANDS, OPERANDS_SCHEMA, FrozenTensor, data_of, from_operands, operands
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.linear import nf4_linear
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

_fwd = Op(f"frozen_linear(Tensor x, Tensor? bias, {OPERANDS_SCHEMA}) -> Tensor", __package__)
_dx = Op(f"frozen_linear_dx(Tensor dy, {OPERANDS_SCHEMA}) -> Tensor", __package__)


@_fwd.kernel
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return _fwd.run(x, x=x, weight=from_operands(x.dtype, *weight), bias=bias)


@_fwd.fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    shape = weight[4]
    return x.new_empty((*x.shape[:-1], shape[0]))


@_fwd.autocast
def _(dtype: torch.dtype, x: Tensor, bias: Tensor | None, data: Tensor, *scales_and_shape: Any) -> Tensor:
    if x.dtype == torch.float64:  # as autocast treats F.linear
        dtype = torch.float64
    if scales_and_shape[-1] == "":  # dense
        data = data.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.ops.lora_ops.frozen_linear(x.to(dtype), bias, data, *scales_and_shape)


@_dx.kernel
def _(dy: Tensor, *weight: Any) -> Tensor:
    return _dx.run(dy, dy=dy, weight=from_operands(dy.dtype, *weight))


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
        dx = torch.ops.lora_ops.frozen_linear_dx(dy, *ctx.saved_tensors, ctx.shape, ctx.layout)
    if ctx.needs_input_grad[1]:
        # torch sums 16-bit tensors in float32 and rounds once.
        dbias = dy.sum(tuple(range(dy.dim() - 1)), dtype=ctx.bias_dtype) if dy.dim() > 1 else dy.clone()
    return dx, dbias, *(None,) * N_OPERANDS


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight = inputs
    *tensors, ctx.shape, ctx.layout = weight
    ctx.save_for_backward(*tensors)


def _backward_dx(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY · W is linear in dY: its gradient is ddX · Wᵀ."""
    ddy = torch.ops.lora_ops.frozen_linear(ddx, None, *ctx.saved_tensors, ctx.shape, ctx.layout)
    return ddy, *(None,) * N_OPERANDS


_fwd.autograd(_backward, _setup_context)
_dx.autograd(_backward_dx, _setup_context_dx)


def frozen_linear(x: Tensor, weight: Tensor | FrozenTensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer over a frozen weight, in the fastest way that this machine has: y = x Wᵀ + b.

    cuBLAS on a GPU, and `nf4_linear` over an NF4Tensor. On the CPU lora_ops multiplies itself wherever torch has no
    fast product of the dtype: 16 bits without AVX-512 take a hundredth of torch's time. Differentiable in x and bias; x
    is not saved for the backward. Under autocast x, W and bias are cast as F.linear casts them.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [N, K] of x's dtype (any floating dtype under autocast), or of that shape an NF4Tensor or another frozen
            format. Frozen.
        bias: [N], x's dtype (any floating dtype under autocast), or None.

    Returns:
        [..., N] in the dtype of x, or in that of autocast.

    Raises:
        TypeError, ValueError: if a dtype, shape or device does not fit, or if weight wants a gradient.

    Source: the base product of LoRA (Hu et al. 2021), equation 3.
    """
    if isinstance(weight, NF4Tensor):
        return nf4_linear(x, weight, bias)
    _check(x, weight, bias)
    if is_plain_call(x, data_of(weight), bias):
        return _fwd.run(x, x=x, weight=weight, bias=bias)
    return torch.ops.lora_ops.frozen_linear(x, bias, *operands(weight))


def _check(x: Tensor, weight: Tensor | FrozenTensor, bias: Tensor | None) -> None:
    """Raise if the operands do not fit each other."""
    check_dtype("x", x, FLOAT_DTYPES)
    like_x = FLOAT_DTYPES if autocasting(x) else (x.dtype,)
    if isinstance(weight, FrozenTensor):
        weight.check("weight")
    else:
        check_dtype("weight", weight, like_x)
        if weight.requires_grad:
            raise ValueError(
                "weight: expected requires_grad=False (frozen_linear computes no gradient for it; F.linear does)"
            )
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    check_last_dim("x", x, k)
    if bias is not None:
        check_dtype("bias", bias, like_x)
        check_shape("bias", bias, N=n)
    check_same_device(x=x, weight=data_of(weight), bias=bias)
