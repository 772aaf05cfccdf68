"""Linear layer with a low-rank update: schemas, shape rules, gradient formula and the public function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lora_ops.kernels.lora_linear.operands import Adapter, Needs
from lora_ops.quant.frozen import N_OPERANDS, OPERANDS_SCHEMA, FrozenTensor, data_of, from_operands, operands
from lora_ops.runtime.checks import (
    FLOAT_DTYPES,
    autocasting,
    check_dtype,
    check_last_dim,
    check_probability,
    check_same_device,
    check_shape,
)
from lora_ops.runtime.dispatch import Op
from lora_ops.runtime.plain_call import is_plain_call

# The adapter's, by x's.
_ADAPTER_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
_ADAPTER = "Tensor lora_a, Tensor lora_b, Tensor scale, float dropout_p, Tensor? seed"
_fwd = Op(f"lora_linear(Tensor x, Tensor? bias, {_ADAPTER}, {OPERANDS_SCHEMA}) -> (Tensor y, Tensor s)", __package__)
_bwd = Op(
    f"lora_linear_backward(Tensor dy, Tensor? x, Tensor? s, {_ADAPTER}, bool[4] needs, {OPERANDS_SCHEMA})"
    " -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dbias)",
    __package__,
)


def _s_dtype(dtype: torch.dtype) -> torch.dtype:
    """S is kept in the accumulator's dtype: it is [M, R], small beside x."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@_fwd.kernel
def _(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    *weight: Any,
) -> tuple[Tensor, Tensor]:
    adapter = Adapter(lora_a, lora_b, scale, dropout_p, seed)
    return _fwd.run(x, x=x, weight=from_operands(x.dtype, *weight), adapter=adapter, bias=bias)


@_fwd.fake
def _(x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], lora_b.shape[0]))
    return y, x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=_s_dtype(x.dtype))


@_fwd.autocast
def _(dtype: torch.dtype, x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    # lora_a and lora_b keep their dtype: the op takes float32 adapters under 16-bit activations, with exact gradients.
    if x.dtype == torch.float64:  # as autocast treats F.linear
        dtype = torch.float64
    adapter, (data, *scales_and_shape) = rest[:-N_OPERANDS], rest[-N_OPERANDS:]
    if scales_and_shape[-1] == "":  # dense
        data = data.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.ops.lora_ops.lora_linear(x.to(dtype), bias, *adapter, data, *scales_and_shape)


@_bwd.kernel
def _(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    *weight: Any,
) -> tuple[Tensor, ...]:
    adapter = Adapter(lora_a, lora_b, scale, dropout_p, seed)
    w = from_operands(dy.dtype, *weight)
    grads = _bwd.run(dy, dy=dy, x=x, s=s, weight=w, adapter=adapter, needs=Needs(*needs))
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@_bwd.fake
def _(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
    *weight: Any,
) -> tuple[Tensor, ...]:
    grads = (
        lambda: dy.new_empty((*dy.shape[:-1], lora_a.shape[1])),
        lambda: torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        lambda: torch.empty_like(lora_b, memory_format=torch.contiguous_format),
        lambda: dy.new_empty(lora_b.shape[0]),
    )
    return tuple(grad() if need else dy.new_empty(0) for grad, need in zip(grads, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, lora_a, lora_b, scale, dropout_p, seed, *weight = inputs
    *tensors, ctx.shape, ctx.layout = weight
    ctx.dropout_p = dropout_p
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    needs_a, needs_b = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
    ctx.save_for_backward(x if needs_a else None, s if needs_b else None, lora_a, lora_b, scale, seed, *tensors)


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of x, bias, lora_a and lora_b; see reference.py for the formulas."""
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 1)]
    grads: list[Tensor | None] = [None] * 4
    if dy is not None:
        x, s, lora_a, lora_b, scale, seed, *weight = ctx.saved_tensors
        out = torch.ops.lora_ops.lora_linear_backward(
            dy, x, s, lora_a, lora_b, scale, ctx.dropout_p, seed, needs, *weight, ctx.shape, ctx.layout
        )
        grads = [g if need else None for g, need in zip(out, needs, strict=True)]
    dx, dlora_a, dlora_b, dbias = grads
    return dx, dbias, dlora_a, dlora_b, None, None, None, *(None,) * N_OPERANDS


_fwd.autograd(_backward, _setup_context)
_bwd.not_differentiable()


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Linear layer with a low-rank update over a frozen weight: y = x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ.

    The same as this PyTorch, with one rounding instead of five and without its temporaries:

        y = F.linear(x, W, bias) + scale * F.linear(F.linear(F.dropout(x, p), lora_a), lora_b)

    Differentiable in x, lora_a, lora_b and bias. Saved for the backward: x, S = drop(x) Aᵀ [M, R] and nothing else; the
    mask is drawn again from its seed. Under autocast x, W and bias are cast as F.linear casts them; the adapter is not.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [N, K] of x's dtype (any floating dtype under autocast), or of that shape an NF4Tensor or another frozen
            format. Frozen.
        lora_a: [R, K], x's dtype or float32. Its gradient has its dtype and is not rounded before.
        lora_b: [N, R], likewise.
        scale: α / r (or α / √r): a number or a 0-d tensor (one graph for all its values under torch.compile).
        bias: [N], x's dtype (any floating dtype under autocast), or None.
        dropout_p: probability to drop an element of the low-rank branch's input, applied as round(p · 2^16) / 2^16.
        seed: of the dropout mask, a number or an int64 0-d tensor on x's device; None draws one from torch's generator
            of that device (so that activation checkpointing draws the same mask again).

    Returns:
        [..., N] in the dtype of x, or in that of autocast. Repeated calls give the same bits; on the CPU so does any
        number of threads, except over dense weights that torch multiplies: of 64 bits, and on some CPUs of 16 or 32.

    Raises:
        TypeError, ValueError: if a dtype, shape or device does not fit, or if weight, scale or seed wants a gradient.

    Source: LoRA (Hu et al. 2021), equation 3; QLoRA (Dettmers et al. 2023), equation 5.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    # First of all: what is plain is on the CPU and not under autocast, which needs no look then.
    plain = is_plain_call(x, data_of(weight), lora_a, lora_b, bias, scale if isinstance(scale, Tensor) else None)
    _check(x, weight, lora_a, lora_b, scale, bias, dropout_p, plain=plain)
    seed = _seed_tensor(seed, dropout_p, x.device)
    if plain:
        scale = _scale_tensor(scale) if isinstance(scale, Tensor) else _constant(scale)
        adapter = Adapter(lora_a, lora_b, scale, dropout_p, seed)
        y, _ = _fwd.run(x, x=x, weight=weight, adapter=adapter, bias=bias)
    else:
        y, _ = torch.ops.lora_ops.lora_linear(
            x, bias, lora_a, lora_b, _scale_tensor(scale), dropout_p, seed, *operands(weight)
        )  # fmt: skip
    return y


def _check(
    x: Tensor,
    weight: Tensor | FrozenTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    *,
    plain: bool,
) -> None:
    """Raise if operands do not fit x, whose dtype is checked; `plain` as `is_plain_call` answers."""
    autocast = not plain and autocasting(x)
    like_x = FLOAT_DTYPES if autocast else (x.dtype,)
    if isinstance(weight, FrozenTensor):
        weight.check("weight")
    else:
        check_dtype("weight", weight, like_x)
        if weight.requires_grad:
            raise ValueError("weight: expected requires_grad=False (lora_linear computes no gradient for it)")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    check_last_dim("x", x, k)
    adapter_dtypes = FLOAT_DTYPES if autocast else _ADAPTER_DTYPES[x.dtype]
    check_dtype("lora_a", lora_a, adapter_dtypes)
    if lora_a.dim() != 2 or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a: expected (R >= 1, K={k}), got {tuple(lora_a.shape)}")
    r = lora_a.shape[0]
    check_shape("lora_a", lora_a, R=r, K=k)
    check_dtype("lora_b", lora_b, adapter_dtypes)
    check_shape("lora_b", lora_b, N=n, R=r)
    if bias is not None:
        check_dtype("bias", bias, like_x)
        check_shape("bias", bias, N=n)
    check_probability("dropout_p", dropout_p)
    if scale is None or isinstance(scale, (str, complex)):
        raise ValueError(f"scale: expected a number or a floating 0-d tensor, got {scale!r}")
    if not plain:
        check_same_device(x=x, weight=data_of(weight), lora_a=lora_a, lora_b=lora_b, bias=bias)


@functools.lru_cache(maxsize=64)
def _constant(scale: float) -> Tensor:
    """`scale` as a tensor, made once: 1.4 µs, of 80 for a layer in generation."""
    with torch.inference_mode(False):  # an inference tensor would stay one
        return torch.scalar_tensor(scale, dtype=torch.float64)


def _scale_tensor(scale: float | Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        # On the CPU, read without a synchronisation. A product where torch.compile looks, which keeps that free of
        # recompiles, but takes 3 µs.
        if torch.compiler.is_compiling():
            return torch.ones((), dtype=torch.float64) * scale
        return torch.scalar_tensor(scale, dtype=torch.float64)
    if scale.dim() != 0 or not scale.dtype.is_floating_point:
        raise ValueError(f"scale: expected a number or a floating 0-d tensor, got {scale.dtype} {tuple(scale.shape)}")
    if scale.requires_grad:
        raise ValueError("scale: expected requires_grad=False (lora_linear computes no gradient for it)")
    return scale


def _seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, (str, float)):
        raise ValueError(f"seed: expected an integer or an int64 0-d tensor, got {seed!r}")
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed: expected an int64 0-d tensor on {device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return seed
