"""One line that puts fused LoRA layers into a Hugging Face model, and the way back.

Imports torch only: peft and transformers are imported when a function needs them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_ops.nn import NF4Linear, check_quantize, is_conv1d
from lora_ops.runtime.checks import check_probability
from lora_ops.runtime.machine import warn_slow_16bit

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraConfig

_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


class InjectionError(RuntimeError):
    """`inject(..., strict=True)` met layers that cannot be fused or quantized."""


def inject(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | list[str] | set[str] = "all-linear",
    quantize: str | None = None,
    skip_modules: str | Iterable[str] | None = None,
    strict: bool = False,
    **lora_config_kwargs: Any,
) -> PeftModel:
    """Put LoRA adapters into a model and run them on `lora_linear`: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    A plain model becomes a PeftModel with one new adapter; its base is frozen and its linear layers are replaced in
    place. In a PeftModel the LoRA layers that it has are swapped in place: names, Parameters, hooks and optimizer
    references stay what they are, and a second call changes nothing. bitsandbytes 4-bit (nf4) base layers become
    NF4Linear over the same bytes. What is not plain LoRA over a linear layer keeps PEFT's math; `injection_report` says
    which layers and why. The adapter is saved, loaded, merged and switched as with PEFT alone. On a CPU
    where torch's products of a dtype are slow, frozen linear layers without an adapter run on `frozen_linear`, and
    attention of 16-bit models in float32.

    Args:
        model: a transformers model, any nn.Module, or a PeftModel with LoRA adapters.
        r: rank. This and the next three configure a new adapter: none may be given (other than its default) for a
            PeftModel.
        lora_alpha: scale s = lora_alpha / r.
        lora_dropout: dropout probability of the low-rank branch, independent for each layer.
        target_modules: as in PEFT's LoraConfig: names, a regular expression, or "all-linear" for every linear layer but
            the output embedding, what is trained whole, and those whose weight the model's own code reads instead of
            calling the layer.
        quantize: "nf4" stores the weights of all linear layers in double-quantized NF4, targeted or not, except the
            output embedding, modules that are trained whole, routers of experts, those that the model wants in float32
            (`_keep_in_fp32_modules`) and those whose weight the model's own code reads; what stays dense is logged.
            None leaves them.
        skip_modules: further modules that stay out of NF4, with all that is in them: full names, last components of
            names ("mlp.down_proj"), or regular expressions of either.
        strict: raise if a targeted layer cannot be fused or quantize="nf4" would leave dense what is neither embedding,
            norm, bias nor convolution, and not trained whole or kept in float32: before anything is quantized.
        lora_config_kwargs: other fields of PEFT's LoraConfig. What the model draws anew, such as a classification head,
            is added to modules_to_save.

    Returns:
        The PeftModel: `model` itself if it was one.

    Raises:
        ImportError: if peft or transformers is missing.
        TypeError: if model is not an nn.Module, or an option is not a field of LoraConfig.
        ValueError: if an argument is not valid, or a weight that is to be quantized is not finite, offloaded or on the
            meta device.
        InjectionError: with `strict`, naming the layers and the reasons.
    """
    require("peft", "transformers")
    import peft

    from lora_ops.injection import heads, methods, protect

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    methods.watch()
    check_quantize(quantize)
    patterns = protect.check_skip_modules(skip_modules, quantize)
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    given = isinstance(model, peft.PeftModel)
    root: Any = model
    if given:
        _check_given(model, quantize, [n for n, v in options.items() if v != _DEFAULTS[n]] + list(lora_config_kwargs))
        root = root.get_base_model()
    kept = protect.kept_dense(root, patterns) if quantize else {}
    if quantize:
        protect.check_quantizable(root, kept)
    if given:
        if strict:
            _check_strictly(model, quantize, kept)
        heads.tell_of_frozen_heads(model)
    else:
        adapted = _with_adapter(model, options, lora_config_kwargs, quantize)
        if strict:
            try:
                _check_strictly(adapted, quantize, kept)
            except InjectionError:
                adapted.unload()
                raise
        model = adapted
    _run_on_ops(model, quantize, kept)
    return model


def _run_on_ops(model: PeftModel, quantize: str | None, kept: Mapping[str, str]) -> None:
    """Put the base into NF4 if asked, and the adapters' layers on our ops, in place."""
    import peft

    from lora_ops.injection import attention, convert, describe, frozen_layers, peft_layers, reads
    from lora_ops.injection.state_dict import know_nf4_parameters

    reads.tell_adapted(model)
    frozen_layers.abandon(model)  # of an earlier call: what is dense now may become NF4
    convert.convert_bases(model, quantize, kept)
    for module in model.modules():
        peft_layers.adopt(module)
    frozen_layers.adopt(model)
    attention.adopt(model)
    if type(model.base_model) is peft.tuners.lora.LoraModel:
        model.base_model.__class__ = peft_layers.LoraModel
    describe.describe(model)
    know_nf4_parameters(model)
    warn_slow_16bit(model, peft_layers.own_products(model))


def _check_given(model: PeftModel, quantize: str | None, options: list[str]) -> None:
    import peft

    from lora_ops.injection import convert, peft_layers

    if options:
        raise ValueError(
            f"{options[0]}: the model is a PeftModel, whose adapter has its own configuration; "
            f"inject(model) takes no {', '.join(options)} for it"
        )
    if not isinstance(model.base_model, peft.tuners.lora.LoraModel):
        raise ValueError(f"model: expected a PeftModel with LoRA adapters, got {type(model.base_model).__name__}")
    if quantize == "nf4":
        for config in model.peft_config.values():
            peft_layers.check_nf4_config(config, initialized=True)
        if merged := [name for name, layer in convert.lora_layers(model) if layer.merged]:
            raise ValueError(f"quantize: {merged[0]} has merged adapters; unmerge them first")


def _with_adapter(model: nn.Module, options: dict[str, Any], others: dict[str, Any], quantize: str | None) -> PeftModel:
    import peft

    from lora_ops.injection import heads, peft_layers, protect

    if any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()):
        raise ValueError(
            "model: expected a model without adapters, or a PeftModel; this one has LoRA layers that were added "
            "without a PeftModel around them"
        )
    config = _lora_config(model, options, others)
    has_nf4 = any(isinstance(m, NF4Linear) for m in model.modules())
    if has_nf4 or quantize == "nf4":
        peft_layers.check_nf4_config(config, initialized=not has_nf4)
        config._register_custom_module({NF4Linear: peft_layers.LoraNF4Linear})
    protect.check_adaptable(model, config)
    whole = config.modules_to_save and list(config.modules_to_save)
    peft_model = peft.get_peft_model(model, config)
    heads.keep_only(peft_model, whole)
    return peft_model


def eject(model: PeftModel) -> PeftModel:
    """Undo `inject`: make the LoRA layers PEFT's own again, in place, with the same names and Parameters.

    A base that was quantized stays an NF4Linear, on which PEFT's forward works and its merge does not.

    Args:
        model: a PeftModel.

    Returns:
        The same model.

    Raises:
        ImportError: if peft or transformers is missing.
        TypeError: if model is not a PeftModel.
        ValueError: if adapters are merged into an NF4 base, which PEFT could not unmerge.
    """
    require("peft", "transformers")
    import peft

    from lora_ops.injection import attention, frozen_layers, peft_layers

    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, peft_layers.LoraNF4Linear) and module.merged:
            raise ValueError(f"model: {name} has adapters merged into its NF4 weight; unmerge them first")
    for module in model.modules():
        peft_layers.abandon(module)
    frozen_layers.abandon(model)
    attention.abandon(model)
    if type(model.base_model) is peft_layers.LoraModel:
        model.base_model.__class__ = peft.tuners.lora.LoraModel
    return model


def require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'lora_ops.inject needs {", ".join(missing)}: install with  pip install "lora_ops[train]"')


def _lora_config(model: nn.Module, options: dict[str, Any], others: dict[str, Any]) -> LoraConfig:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from lora_ops.injection import heads, reads, targets

    r, target_modules = options["r"], options["target_modules"]
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
    check_probability("lora_dropout", options["lora_dropout"])
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    if unknown := [name for name in others if name not in fields]:
        raise TypeError(f"{unknown[0]}: neither an argument of inject nor a field of PEFT's LoraConfig")
    whole = heads.modules_to_save(model, others.get("modules_to_save"))
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
        left_out = reads.leave_out(model, linears) | targets.leave_out(model, linears)
        options = {**options, "target_modules": targets.all_linear(model, whole or [], left_out)}
        if left_out and isinstance(model, PreTrainedModel):
            others = {**others, "exclude_modules": _exclude(others.get("exclude_modules"), left_out)}
    # Conv1D holds (K, N); PEFT sets this itself, with a warning.
    fan_in_fan_out = any(is_conv1d(m) for m in model.modules())
    defaults = {"fan_in_fan_out": fan_in_fan_out, "task_type": targets.task_type(model, whole or [])}
    return LoraConfig(**{**defaults, **options, **others, "modules_to_save": whole})


def _exclude(given: str | list[str] | None, names: set[str]) -> str | list[str]:
    """PEFT's exclude_modules with these full names added."""
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, sorted(names))])
    return [*(given or ()), *sorted(names)]


def _check_strictly(model: PeftModel, quantize: str | None, kept: Mapping[str, str]) -> None:
    from lora_ops.injection import convert, dense, peft_layers, reads

    root = model.get_base_model()
    read = reads.weight_reads(root)
    reasons = []
    for name, layer in convert.lora_layers(model):
        convertible = convert.is_bnb_lora(layer) and not layer.merged
        if layer in read and not read[layer].called:
            reasons.append(f"{name}: {read[layer].reason}")
        elif not convertible and (reason := peft_layers.why_not_fused(layer)):
            reasons.append(f"{name}: {reason}")
    if reasons:
        raise InjectionError("\n  ".join([f"strict: {len(reasons)} targeted layers cannot be fused:", *reasons]))
    if quantize is None:
        return
    counted = dense.model_bytes(root, dense.dense_reasons(root, kept))
    if rows := [row for row in counted.dense if not row.by_design]:
        raise InjectionError(
            "\n  ".join(
                [
                    "strict: quantize='nf4' would leave dense, as shares of the unquantized model:",
                    *(row.describe(counted.total) for row in rows),
                    "name what may stay dense in skip_modules, or leave strict out",
                ]
            )
        )
