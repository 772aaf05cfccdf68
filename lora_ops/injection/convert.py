"""The base layers of a model's adapters in NF4: from dense weights, and from bitsandbytes' layers over the same bytes.

Imports peft: imported only when `inject` or `quantize` is called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lora_ops.formats import bitsandbytes as layout
from lora_ops.injection import dense, frozen_layers, protect
from lora_ops.nn import NF4Linear, is_conv1d
from lora_ops.quant.nf4 import NF4Tensor

logger = logging.getLogger("lora_ops")

_PROGRESS_NUMEL = 1 << 28  # a progress bar from about the size whose quantization takes seconds


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def is_bnb_lora(layer: Any) -> bool:
    """Whether this is plain LoRA over a bitsandbytes layer in nf4, which can become ours."""
    base = layer.get_base_layer()
    return (
        type(layer).__name__ in ("Linear4bit", "Linear")
        and type(layer).__module__ in ("peft.tuners.lora.bnb", "peft.tuners.lora.layer")
        and layout.is_linear4bit(base)
        and layout.why_not_nf4(base) is None
        and not layer.lora_variant
    )


def convert_bases(model: nn.Module, quantize: str | None, kept: Mapping[str, str]) -> None:
    """Make NF4Linears of bitsandbytes' nf4 layers and, if asked, of dense ones, one after the other.

    Args:
        model: all of it, adapted or not, but what is trained whole.
        quantize: None or "nf4".
        kept: the names of modules that stay dense, and why.
    """
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    repacked = []
    for name, owner, linear in list(protect.linear_layers(root)):
        if not layout.is_linear4bit(linear) or layout.why_not_nf4(linear) is not None:
            continue
        # A layer with merged adapters stays PEFT's, whose class alone can take them out again.
        if not isinstance(owner, LoraLayer) or (is_bnb_lora(owner) and not owner.merged):
            attribute = "base_layer" if isinstance(owner, LoraLayer) else name.rpartition(".")[2]
            if layout.is_repacked(linear):
                repacked.append(name)
            _put(owner, attribute, _from_bitsandbytes(linear))
    if repacked:
        logger.warning(
            "bitsandbytes has rounded the scales of %d NF4 layers (%s%s) to bfloat16, in a forward in eval() on this "
            "CPU; to keep them exact call inject before the first forward",
            len(repacked), repacked[0], ", ..." * (len(repacked) > 1),
        )  # fmt: skip
    if quantize != "nf4":
        return
    reasons = dense.dense_reasons(root, kept)
    todo = _quantizable(root, reasons)
    numel = sum(linear.weight.numel() for _, linear, _ in todo)
    made: dict[Any, NF4Linear] = {}  # layers that share a weight share it in NF4 too
    for name, linear, places in tqdm(
        todo, desc="quantizing to NF4", disable=None if numel >= _PROGRESS_NUMEL else True
    ):
        key = linear.weight, is_conv1d(linear)
        quantized = _share(made[key], linear) if key in made else _quantize(name, linear)
        made.setdefault(key, quantized)
        for owner, attribute in places:
            _put(owner, attribute, quantized)
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True  # what models of transformers ask before they read a weight themselves
    dense.tell(root, reasons)


def _from_bitsandbytes(linear: Any) -> NF4Linear:
    """The same layer over the same bytes; it keeps computing in the dtype that bitsandbytes computes in."""
    q = NF4Tensor.from_state_dict(linear.state_dict())
    nf4 = NF4Linear.from_quantized(q, linear.bias).train(linear.training)
    nf4.source_cls = getattr(linear, "source_cls", nn.Linear)
    nf4.compute_dtype = linear.compute_dtype
    return nf4


def _put(owner: Any, attribute: str, nf4: NF4Linear) -> None:
    if attribute == "base_layer" and isinstance(owner, LoraLayer):
        _set_base(owner, nf4)
    else:
        setattr(owner, attribute, nf4)


def _quantize(name: str, linear: nn.Module) -> NF4Linear:
    try:
        return NF4Linear.from_linear(linear)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _share(quantized: NF4Linear, linear: Any) -> NF4Linear:
    """A layer over the Parameters of another's weight, with the bias of `linear`."""
    layer = NF4Linear.from_quantized(quantized.quantized, linear.bias).train(linear.training)
    layer.source_cls = type(linear)
    for key, parameter in quantized._parameters.items():
        if key != "bias":
            layer._parameters[key] = parameter
    layer._buffers.update(quantized._buffers)
    return layer


def _quantizable(root: nn.Module, reasons: Mapping[nn.Parameter, Any]) -> list[tuple[str, Any, list[tuple[Any, str]]]]:
    """The dense linear layers that quantize="nf4" takes, with their names and the places where they stand."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    inside = set(frozen_layers.adapters(root))  # and parts of modules that are trained whole
    for module in root.modules():
        for attribute, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append((module, attribute))
        if dense.is_trained_whole(module):
            inside.update(module.modules())
    return [
        (name.removesuffix(".base_layer"), module, places[module])
        for name, module in root.named_modules()
        if name
        and (isinstance(module, nn.Linear) or is_conv1d(module))
        and not isinstance(module, NF4Linear)
        and module not in inside
        and module._parameters.get("weight") is not None
        and module.weight not in reasons
    ]


def _set_base(layer: Any, base: NF4Linear) -> None:
    """Give PEFT's layer an NF4 base, of which PEFT's own class for dense layers is the wrapper."""
    layer.base_layer = base
    # What lora.Linear has and PEFT's 4-bit layer lacks; an NF4Linear holds (N, K) also where it was a Conv1D.
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    if type(layer).__module__ == "peft.tuners.lora.bnb":
        layer.__class__ = lora.Linear
