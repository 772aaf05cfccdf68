"""AdamW's update in plain PyTorch, in the order of operations that every backend keeps: results are bit-equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ops.kernels.adamw.operands import Slices
from lora_ops.kernels.philox.reference import LANES, philox_4x32
from lora_ops.quant.blockwise8.reference import dequantize_blockwise8, dynamic_thresholds, scaled

BLOCK_SIZE = 256  # elements of an 8-bit state that share one absmax


def adamw_(*, slices: Slices) -> None:
    """Update every slice in place; see op.py for the arguments."""
    params, grads, exp_avgs, exp_avg_sqs, absmaxes, constants, index, seed = slices
    scales = iter(absmaxes)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, constants[index[:, 0]], index, strict=True)
    for param, grad, exp_avg, exp_avg_sq, row, (_, *place) in tensors:
        if exp_avg.dtype == torch.float32:
            p = update(param, grad, exp_avg, exp_avg_sq, row)
        else:
            m_absmax, v_absmax = next(scales), next(scales)
            m = dequantize_blockwise8(exp_avg, m_absmax, BLOCK_SIZE, True)
            v = dequantize_blockwise8(exp_avg_sq, v_absmax, BLOCK_SIZE, False)
            p = update(param, grad, m, v, row)
            encode(m, exp_avg, m_absmax, signed=True)
            encode(v, exp_avg_sq, v_absmax, signed=False)
        if seed is not None and param.dtype == torch.bfloat16:
            p = round_stochastically(p, seed, *(int(i) for i in place))
        param.copy_(p)


def update(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, row: Tensor) -> Tensor:
    """Update m and v (fp32) in place; the new parameter in fp32.

    g ← sign · g;  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²
    p ← p · (1 − lr · λ) − lr / (1 − β₁ᵗ) · m / (√v · (1 / √(1 − β₂ᵗ)) + ε)
    """
    decay, beta1c, beta2, beta2c, eps, step_size, bias2, sign = row.to(param.device).unbind()
    g = grad.float() * sign
    m.add_((g - m) * beta1c)
    v.mul_(beta2).add_(g * beta2c * g)
    # In float64: torch 2.13's float32 sqrt is off by a unit in 20 % of values on the CPU; hardware's rounds correctly.
    return param.float() * decay - m * step_size / (v.double().sqrt().float() * bias2 + eps)


def encode(x: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    """Quantize x fp32 [n] into codes and absmax; a block that holds inf or NaN becomes NaN as a whole when decoded."""
    v, scale = scaled(x, BLOCK_SIZE)
    codes.copy_(torch.bucketize(v, dynamic_thresholds(signed).to(x.device), out_int32=True))
    absmax.copy_(scale)


def round_stochastically(x: Tensor, seed: int, stream: int, step: int, first: int) -> Tensor:
    """x fp32 [n] to bf16, up with the probability of what is cut off; 16 random bits an element, by Philox.

    key = seed, counter = (element // 8, stream, step, 0); lane element % 8 is added to the bits below bf16's last one.

    Args:
        stream: number of the tensor. step: of the tensor. first: element of the tensor that x begins at.
    """
    e = torch.arange(first, first + x.numel(), device=x.device)
    c0 = e // LANES
    words = philox_4x32(
        c0 & 0xFFFFFFFF, torch.full_like(c0, stream), torch.full_like(c0, step), c0 >> 32,
        torch.tensor(seed, device=x.device),
    )  # fmt: skip
    lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)
    lane = lanes.gather(-1, (e % LANES)[:, None]).squeeze(-1).to(torch.int32)
    bits = x.view(torch.int32)
    rounded = ((bits + lane) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


IMPLS: dict[str, Callable] = {"adamw_": adamw_}
