"""The others, over the same operands as ours: bitsandbytes, PEFT, torchao, and PEFT's formula inline.

bitsandbytes' layers repack themselves at their first forward in eval mode on the CPU, so every contender gets a layer
of its own; weights are built from our bytes, which are theirs too. torchao's NF4 is a format of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.environment import exception_line
from bench.measure import Unavailable
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import NF4Tensor, nf4_code
from tests.cases import LinearInputs, keep_mask, rounded_weight


def load(name: str) -> ModuleType:
    """Import a peer, or say that it is missing, or broken: one that does not fit this torch may raise anything."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported: {exception_line(error)}") from error


def notes() -> list[str]:
    """What a reader who misses a peer should know."""
    found = ["Unsloth's way: its order of passes in plain torch calls; the package itself is not run"]
    spec = importlib.util.find_spec("liger_kernel")
    if spec is None:
        return [*found, "Liger Kernel: not installed; it has no LoRA layer and no 4-bit product to compare with"]
    folders = [f"{folder}/ops" for folder in spec.submodule_search_locations or ()]  # without importing the package
    names = [info.name for info in pkgutil.iter_modules(folders)]
    if alike := [name for name in names if "lora" in name.lower()]:
        return [*found, f"Liger Kernel: {', '.join(alike)} is not compared yet: bench/peers.py has no contender for it"]
    return [*found, f"Liger Kernel: none of its {len(names)} groups of ops is a LoRA layer or a 4-bit product"]


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
