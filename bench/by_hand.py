"""LoRA by hand: separate torch calls for the products of cuBLAS or oneDNN, the low-rank ones added by addmm_."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import Unavailable
from bench.peers import bnb_state, load
from lora_ops.functional import dequantize_nf4
from lora_ops.kernels.philox import keep_scale
from lora_ops.quant.nf4 import NF4Tensor
from tests.cases import LinearInputs, keep_mask

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Weight = Callable[[], Tensor]
Drop = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> dropped and scaled x, mask


class _ByAddmm(torch.autograd.Function):
    """As few passes as separate calls allow: S = drop(x) Aᵀ is kept, dY B is computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Weight,
        scale: float,
        drop: Drop | None,
        p: float,
    ) -> Tensor:
        x2, a16, b16 = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        dropped, mask = (x2, None) if drop is None else drop(x2)
        s = dropped @ a16.t()
        y = x2 @ weight().t()
        y.addmm_(s, b16.t(), alpha=scale)
        ctx.save_for_backward(dropped, mask, s, a, b)
        ctx.weight, ctx.scale, ctx.p, ctx.shape = weight, scale, p, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, s, a, b = ctx.saved_tensors
        a16, b16 = a.to(s.dtype), b.to(s.dtype)
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        ds = dy @ b16
        dx = dy @ ctx.weight()
        if mask is None:
            dx.addmm_(ds, a16, alpha=ctx.scale)
        else:
            low = torch.ops.aten.native_dropout_backward(ds @ a16, mask, keep_scale(ctx.p))
            dx.add_(low, alpha=ctx.scale)
        da = (ds.t() @ dropped) * ctx.scale
        db = (dy.t() @ s) * ctx.scale
        return dx.view(ctx.shape), da.to(a.dtype), db.to(b.dtype), *(None,) * 4


class _AsUnsloth(torch.autograd.Function):
    """The passes of Unsloth's fast path: x Aᵀ is computed again in the backward, and dY B twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Weight, scale: float) -> Tensor:
        x2, a16, b16 = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        y = x2 @ weight().t()
        y.addmm_(x2 @ a16.t(), b16.t(), alpha=scale)
        ctx.save_for_backward(x2, a, b)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x2, a, b = ctx.saved_tensors
        a16, b16 = a.to(x2.dtype), b.to(x2.dtype)
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        da = ((dy @ b16).t() @ x2) * ctx.scale
        db = (dy.t() @ (x2 @ a16.t())) * ctx.scale
        dx = dy @ ctx.weight()
        dx.addmm_(dy @ b16, a16, alpha=ctx.scale)
        return dx.view(ctx.shape), da.to(a.dtype), db.to(b.dtype), None, None


def lora_by_addmm(inputs: LinearInputs, *, given_mask: bool = False) -> Forward:
    """(x, lora_a, lora_b) -> y for a case without bias; an NF4 weight is decoded in each direction.

    Args:
        given_mask: drop what our op drops for these inputs, to be checked against the same truth.
    """
    _refuse_bias(inputs)
    p, scale, decode = inputs.case.dropout_p, inputs.case.scale, _decoder(inputs)
    drop: Drop | None = None
    if p and given_mask:
        mask = keep_mask(inputs)
        assert mask is not None
        mask = mask.view(-1, mask.shape[-1])
        drop = lambda x: (torch.where(mask, x * keep_scale(p), 0.0), mask)  # noqa: E731
    elif p:
        drop = lambda x: torch.native_dropout(x, p, True)  # noqa: E731
    return lambda x, a, b: _ByAddmm.apply(x, a, b, decode, scale, drop, p)


def lora_as_unsloth(inputs: LinearInputs) -> Forward:
    """The same with Unsloth's passes, for a case without bias and dropout."""
    _refuse_bias(inputs)
    if inputs.case.dropout_p:
        raise Unavailable("its fast path has no dropout")
    scale, decode = inputs.case.scale, _decoder(inputs)
    return lambda x, a, b: _AsUnsloth.apply(x, a, b, decode, scale)


def _refuse_bias(inputs: LinearInputs) -> None:
    if inputs.bias is not None:
        raise Unavailable("this way has no bias")


def _decoder(inputs: LinearInputs) -> Weight:
    """Answers the dense weight; an NF4 one decoded by bitsandbytes on a GPU where it is installed, else by ours."""
    weight, dtype = inputs.weight, inputs.x.dtype
    if not isinstance(weight, NF4Tensor):
        return lambda: weight
    if weight.device.type == "cuda":
        try:
            functional, state = load("bitsandbytes").functional, bnb_state(weight)
        except Unavailable:
            pass
        else:
            return lambda: functional.dequantize_4bit(weight.packed, state).to(dtype)
    return lambda: dequantize_nf4(weight, dtype=dtype)
