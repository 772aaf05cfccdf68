"""A plain dense model out of one with adapters, NF4 layers or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops.injection._inject import require
from lora_ops.nn import LoRALinear, NF4Linear, is_conv1d
from lora_ops.runtime.checks import dtype_name

_Goal = Callable[[str, torch.dtype], torch.dtype]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge the active adapters into dense weights: W ← round(dequantize(W) + Σ scale · B A), rounded once.

    The sums are PEFT's own, in float32 and layer by layer, so that there is no second dense copy of the model; other
    kinds of adapters than LoRA merge likewise. The model is used up, as by PEFT's `merge_and_unload`. What comes back
    has the classes and names that the model was built with, and `save_pretrained` and `from_pretrained` take it as any
    other. Without adapters the NF4 layers alone become dense.

    Args:
        model: a PeftModel, or any module with NF4Linear or LoRALinear layers.
        dtype: of all weights of the result, but those that the model keeps in float32; None leaves each weight its own,
            and an NF4 layer that of the weight which was quantized.

    Returns:
        The model without adapters.

    Raises:
        ImportError: if peft or transformers is missing.
        TypeError: if model is not an nn.Module.
        ValueError: if dtype is not a floating one, the adapters are not in weights (prompt tuning), a weight is another
            library's, on the meta device or sharded, or an adapter is not finite: then nothing is changed. If a sum
            exceeds the range of `dtype`, which is found while merging.
        NotImplementedError: if the adapter's method cannot be merged; nothing is changed.
    """
    require("peft", "transformers")
    import peft

    from lora_ops.injection import attention, describe, frozen_layers, methods

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(map(dtype_name, _DTYPES))} or None, got {dtype!r}")
    methods.watch()
    if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"model: {model.active_peft_config.peft_type.value} adapters are no weights to merge")
    adapted = list(_adapted_layers(model))
    _check(model, adapted)
    frozen_layers.abandon(model)
    attention.abandon(model)
    goal = _goal(model, dtype)
    for name, layer in adapted:
        _merge_layer(name, layer, goal)
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload(adapter_names=[])  # they are merged: PEFT takes its layers out
    model = _make_dense(model, goal)
    _round(model, {name: goal(name, p.dtype) for name, p in model.named_parameters()}, type(model).__name__)
    describe.forget(model)
    return model


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that hold adapters, the outer ones first, without those that belong to another."""
    from peft.tuners.lora.layer import MultiheadAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    owned: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module not in owned:
            yield name, module
            if isinstance(module, MultiheadAttention):  # merges the adapter of its output projection itself
                owned.update(module.modules())


def _check(model: nn.Module, adapted: list[tuple[str, Any]]) -> None:
    """Raise unless every weight can be merged, before any is touched."""
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            owner = f"{name}.{key}".lstrip(".")
            if p.is_meta:
                raise ValueError(
                    f"model: {owner} is on the meta device (offloaded?); load the whole model before merging"
                )
            if type(p) not in (nn.Parameter, Tensor):
                raise ValueError(
                    f"model: expected plain weights, got {owner}, a {type(p).__name__}; inject or quantize "
                    "takes over bitsandbytes' nf4 layers, sharded ones are to be gathered"
                )
            if not (isinstance(module, NF4Linear) or p.is_floating_point()):
                raise ValueError(f"model: expected floating weights, got {owner} of {dtype_name(p.dtype)}")
    for name, layer in adapted:
        active = set(_names(layer))
        for key, p in layer.named_parameters():
            if active.intersection(key.split(".")) and not bool(torch.isfinite(p).all()):
                raise ValueError(f"model: {name}.{key} is not finite: the adapter is broken; nothing was merged")


def _names(layer: Any) -> list[str]:
    return list(dict.fromkeys([*layer.merged_adapters, *layer.active_adapters]))


def _merge_layer(name: str, layer: Any, goal: _Goal) -> None:
    """Let PEFT add the adapters to a base in float32 (float64 if it is), and round the sum once."""
    from lora_ops.injection import methods, peft_layers

    names, nf4 = _names(layer), layer.base_layer
    if isinstance(nf4, NF4Linear):
        if layer.merged:
            layer.unmerge()  # to the bytes before: what was merged into NF4 is rounded to NF4
        peft_layers.abandon(layer)
        methods.allow_merge(layer)
        layer.base_layer = _dense(nf4, torch.float32)
    before = {key: p.dtype for key, p in layer.base_layer.named_parameters()}
    wide = max((torch.promote_types(p.dtype, torch.float32) for p in layer.parameters()), key=lambda d: d.itemsize)
    try:
        layer.to(wide).merge(safe_merge=True, adapter_names=names)
    except (ValueError, RuntimeError) as error:  # of PEFT's: a method without merge, a bias without a place
        _round(layer.base_layer, before, name)
        layer.base_layer = nf4
        raise type(error)(f"model: {name}: {error}") from error
    if isinstance(nf4, NF4Linear):
        before["weight"] = nf4.quantized_dtype
    _round(layer.base_layer, {key: goal(f"{name}.{key}", own) for key, own in before.items()}, name)
    if isinstance(nf4, NF4Linear):
        layer.base_layer = _as_source(nf4, layer.base_layer)
    layer.merged_adapters.clear()


def _round(module: nn.Module, dtypes: dict[str, torch.dtype], name: str) -> None:
    """Round tensors of a module, by name: PEFT's layer for attention has made plain tensors of its Parameters."""
    for key, dtype in dtypes.items():
        t: Tensor = attrgetter(key)(module)
        t.data = t.data.to(dtype)
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"dtype: {name}.{key} exceeds the range of {dtype_name(dtype)}; merge into another dtype")


def _dense(nf4: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(nf4.in_features, nf4.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(nf4.dequantize(dtype), requires_grad=False)
    linear.register_parameter("bias", nf4.bias)
    return linear.train(nf4.training)


def _as_source(nf4: NF4Linear, linear: nn.Linear) -> Any:
    """A Conv1D where the NF4 layer replaced one, which holds the weight as (K, N)."""
    if not is_conv1d(nf4.source_cls):
        return linear
    with torch.device("meta"):
        conv: Any = nf4.source_cls(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    conv.register_parameter("bias", linear.bias)
    return conv.train(nf4.training)


def _make_dense(model: nn.Module, goal: _Goal) -> nn.Module:
    """Replace the NF4Linears and LoRALinears that are left; layers that share a weight go on sharing it."""
    made: dict[int, Any] = {}
    root = nn.ModuleList([model])
    for owner_name, owner in list(root.named_modules()):
        for key, child in list(owner.named_children()):
            name = f"{owner_name}.{key}".partition(".")[2]
            if isinstance(child, LoRALinear):
                setattr(owner, key, _merged(child, goal, name))
            elif isinstance(child, NF4Linear):
                dense = _as_source(child, _dense(child, goal(name, child.quantized_dtype)))
                dense.weight = made.setdefault(id(child.weight), dense).weight
                setattr(owner, key, dense)
    return root[0]


def _merged(layer: LoRALinear, goal: _Goal, name: str) -> nn.Linear:
    if layer.merged:
        layer.unmerge()
    base = layer.base_layer
    own = base.quantized_dtype if isinstance(base, NF4Linear) else base.weight.dtype
    linear = _dense(base, torch.float32) if isinstance(base, NF4Linear) else base
    linear.weight.data = linear.weight.data.to(torch.promote_types(linear.weight.dtype, torch.float32))
    linear.weight.data += layer.scale * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())
    _round(linear, {"weight": goal(name, own)}, name)
    return linear


def _goal(model: Any, dtype: torch.dtype | None) -> _Goal:
    """The dtype of a weight by its name and the dtype that it has, as `from_pretrained(dtype=dtype)` chooses it."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name, own: own if dtype is None or kept.intersection(name.split(".")) else dtype
