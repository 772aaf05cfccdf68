"""The base layers of a model's adapters in NF4: from dense weights, and from bitsandbytes' layers over the same bytes.

Imports peft: only `inject` imports this file, when called.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm

from lora_ops.formats import bitsandbytes as layout
from lora_ops.injection import peft_layers
from lora_ops.nn import NF4Linear, is_conv1d

if TYPE_CHECKING:
    from peft import PeftModel

_PROGRESS_NUMEL = 1 << 28  # a progress bar from about the size whose quantization takes seconds


def lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def is_bnb_lora(layer: Any) -> bool:
    """Whether this is plain LoRA over a bitsandbytes Linear4bit in nf4; told by names, so as not to import it."""
    base = layer.get_base_layer()
    return (
        type(layer).__name__ in ("Linear4bit", "Linear")
        and type(layer).__module__ in ("peft.tuners.lora.bnb", "peft.tuners.lora.layer")
        and type(base).__name__ in ("Linear4bit", "LinearNF4")
        and type(base).__module__ == "bitsandbytes.nn.modules"
        and getattr(base.weight, "quant_type", None) == "nf4"
        and getattr(base.weight, "quant_state", None) is not None
        and not layer.lora_variant
    )


def convert_bases(model: PeftModel, quantize: str | None) -> None:
    """Make NF4Linears of bitsandbytes' nf4 layers and, if asked, of dense ones, one after the other."""
    for _, layer in lora_layers(model):
        if is_bnb_lora(layer) and not layer.merged:  # only PEFT's own class can take a merged adapter out again
            base = layer.base_layer
            q = layout.from_state_dict(base.state_dict())
            _set_base(layer, NF4Linear.from_quantized(q, base.bias).train(base.training))
    if quantize != "nf4":
        return
    todo = _quantizable(model)
    numel = sum(linear.weight.numel() for _, _, linear in todo)
    for name, owner, linear in tqdm(todo, desc="quantizing to NF4", disable=None if numel >= _PROGRESS_NUMEL else True):
        quantized = _quantize(name, linear)
        if hasattr(owner, "base_layer"):
            _set_base(owner, quantized)
        else:
            setattr(owner, name.rpartition(".")[2], quantized)


def _quantize(name: str, linear: nn.Module) -> NF4Linear:
    try:
        return NF4Linear.from_linear(linear)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _quantizable(model: PeftModel) -> list[tuple[str, Any, Any]]:
    """The dense linear layers that quantize="nf4" takes, with their names and the modules that hold them."""

    root = model.get_base_model()
    output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    keep = {*(getattr(root, "_keep_in_fp32_modules", None) or ()),
            *(getattr(root, "_keep_in_fp32_modules_strict", None) or ())}  # fmt: skip
    holders = Counter(id(p) for m in root.modules() for p in m.parameters(recurse=False))
    todo: list[tuple[str, Any, Any]] = []
    inside = ""  # a LoRA layer or a module that is trained whole, whose parts are not for themselves
    for name, module in root.named_modules():
        if inside and name.startswith(inside):
            continue
        owner = root.get_submodule(name.rpartition(".")[0])
        linear: Any = module
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            inside = name + "."
            if isinstance(module, AuxiliaryTrainingWrapper) or peft_layers.why_not_fusable(module) is not None:
                continue
            owner, linear = module, module.get_base_layer()
        elif type(module) is not nn.Linear and not is_conv1d(module):
            continue
        if isinstance(linear, NF4Linear) or output is module or output is linear or not name:
            continue
        # A weight that another module reads as well, such as a tied embedding, cannot become uint8.
        if not keep.intersection(name.split(".")) and holders[id(linear.weight)] == 1:
            todo.append((name, owner, linear))
    return todo


def _set_base(layer: Any, base: NF4Linear) -> None:
    """Give PEFT's layer an NF4 base, of which PEFT's own class for dense layers is the wrapper."""
    layer.base_layer = base
    # What lora.Linear has and PEFT's 4-bit layer lacks; an NF4Linear holds (N, K) also where it was a Conv1D.
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    if type(layer).__module__ == "peft.tuners.lora.bnb":
        layer.__class__ = lora.Linear
