"""The others, over the same operands as ours: bitsandbytes, PEFT, torchao, and LoRA written with addmm.

bitsandbytes' layers repack themselves at their first forward in eval mode on the CPU, so every contender gets a layer
of its own; weights are built from our bytes, which are theirs too. torchao's NF4 is a format of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Unavailable
from lora_ops.functional import dequantize_nf4
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import NF4Tensor, nf4_code
from tests.cases import LinearInputs, keep_mask, rounded_weight


def load(name: str) -> ModuleType:
    """Import a peer, or say that it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def bnb_state(q: NF4Tensor) -> Any:
    """Our scales as a bitsandbytes QuantState."""
    functional = load("bitsandbytes").functional
    # bitsandbytes repacks states in place: it gets copies.
    common = {"code": nf4_code(q.device), "blocksize": q.block_size, "quant_type": "nf4", "dtype": q.dtype}
    if q.nested_absmax is None or q.nested_offset is None:
        return functional.QuantState(q.absmax.clone(), shape=torch.Size(q.shape), **common)
    nested = functional.QuantState(
        q.nested_absmax.clone(), code=dynamic_map(signed=True).to(q.device), blocksize=256, dtype=torch.float32
    )
    return functional.QuantState(
        q.absmax.clone(), shape=torch.Size(q.shape), offset=q.nested_offset.clone(), state2=nested, **common
    )


def bnb_linear(q: NF4Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes Linear4bit in training mode that holds our bytes."""
    bnb = load("bitsandbytes")
    n, k = q.shape
    layer = bnb.nn.Linear4bit(k, n, bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        q.packed.clone(),
        requires_grad=False,
        quant_state=bnb_state(q),
        blocksize=q.block_size,
        compress_statistics=q.nested,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = layer.weight.quant_state
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.train()


def torchao_nf4(weight: Tensor) -> Any:
    """torchao's NF4 tensor of a weight; its codes and scales are not bitsandbytes'."""
    return load("torchao.quantization").to_nf4(weight, block_size=64, scaler_block_size=256)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that holds the weight."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


class GivenDropout(nn.Module):
    """Dropout with a given mask, for checking a peer whose own mask cannot be known."""

    def __init__(self, mask: Tensor, keep_scale: float) -> None:
        super().__init__()
        self.mask, self.keep_scale = mask, keep_scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x * self.keep_scale, 0.0)


def peft_layer(inputs: LinearInputs) -> Any:
    """PEFT's LoRA layer over nn.Linear, or over bitsandbytes' Linear4bit for an NF4 weight, with our adapter."""
    peft = load("peft")
    i, c = inputs, inputs.case
    base: nn.Module
    if isinstance(i.weight, NF4Tensor):
        base = bnb_linear(i.weight, i.bias, i.x.dtype)
    else:
        base = dense_linear(i.weight, i.bias)
    config = peft.LoraConfig(r=c.r, lora_alpha=c.scale * c.r, lora_dropout=c.dropout_p, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(base))[0]
    a, b = i.adapter()
    layer.lora_A["default"].weight = nn.Parameter(a.clone())
    layer.lora_B["default"].weight = nn.Parameter(b.clone())
    return layer.train()


class _LoRAByAddmm(torch.autograd.Function):
    """LoRA with as few passes as separate torch calls allow: the low-rank products are added by addmm_ (as Unsloth's
    fast path does it; no dropout).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Callable[[], Tensor], scale: float) -> Tensor:
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
        ds = dy @ b16
        dx = dy @ ctx.weight()
        dx.addmm_(ds, a16, alpha=ctx.scale)
        da = (ds.t() @ x2) * ctx.scale
        db = (dy.t() @ (x2 @ a16.t())) * ctx.scale
        return dx.view(ctx.shape), da.to(a.dtype), db.to(b.dtype), None, None


def lora_by_addmm(inputs: LinearInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, lora_a, lora_b) -> y for a case without bias and dropout; an NF4 weight is decoded in each direction."""
    if inputs.case.dropout_p or inputs.bias is not None:
        raise Unavailable("this way has neither dropout nor bias")
    scale, weight = inputs.case.scale, inputs.weight
    decode = decoder(weight, inputs.x.dtype) if isinstance(weight, NF4Tensor) else lambda: weight
    return lambda x, a, b: _LoRAByAddmm.apply(x, a, b, decode, scale)


def decoder(q: NF4Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Decodes the weight: by bitsandbytes on a GPU where it is installed, else by ours."""
    if q.device.type == "cuda":
        try:
            functional, state = load("bitsandbytes").functional, bnb_state(q)
        except Unavailable:
            pass
        else:
            return lambda: functional.dequantize_4bit(q.packed, state).to(dtype)
    return lambda: dequantize_nf4(q, dtype=dtype)


def eager_lora(inputs: LinearInputs, dropout: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PEFT's mathematics inline, over a dense weight, so that PEFT need not be installed."""
    scale, bias = inputs.case.scale, inputs.bias
    weight = rounded_weight(inputs.weight, inputs.x.dtype)

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = F.linear(x, weight, bias)
        return (result + F.linear(F.linear(dropout(x.to(a.dtype)), a), b) * scale).to(result.dtype)

    return forward


def given_dropout(inputs: LinearInputs) -> nn.Module:
    """Dropout with the mask that our op draws for these inputs."""
    from lora_ops.kernels.philox import keep_scale

    mask = keep_mask(inputs)
    return nn.Identity() if mask is None else GivenDropout(mask, keep_scale(inputs.case.dropout_p))
