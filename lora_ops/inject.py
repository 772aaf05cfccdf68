"""One line that puts fused LoRA layers into a Hugging Face model, the way back, and a report of what was fused.

Imports torch only: peft and transformers are imported when a function needs them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ops._checks import check_probability, dtype_name
from lora_ops._dispatch import OPS, BackendError
from lora_ops.formats import bitsandbytes as layout
from lora_ops.nn import LoRALinear, NF4Linear, check_quantize, is_conv1d, weight_of

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraConfig

_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
_PROGRESS_NUMEL = 1 << 28  # a progress bar from about the size whose quantization takes seconds


class InjectionError(RuntimeError):
    """`inject(..., strict=True)` met layers that cannot be fused."""


@dataclass(frozen=True)
class LayerReport:
    """A row of the report: one LoRA or NF4 layer of the model, in its present state.

    Attributes:
        name: of the module in the model.
        kind: class of the layer that holds the weight.
        fused: whether the forward runs lora_ops' op, by the layer's state and its last call.
        backend: which backend serves the op for one row of activations in the weight's dtype, "" if not fused.
        reason: why it is not fused, or why a preferred backend declines; "" if neither.
        weight_format: "dense bfloat16", "nf4", or the class of another library's weight.
    """

    name: str
    kind: str
    fused: bool
    backend: str
    reason: str
    weight_format: str


class InjectionReport(list[LayerReport]):
    """The rows of a model's report; `str()` is a table with a line of totals."""

    @property
    def unfused(self) -> list[LayerReport]:
        """The rows that are not fused."""
        return [row for row in self if not row.fused]

    def __str__(self) -> str:
        if not self:
            return "no LoRA or NF4 layer in this model"
        table = [("layer", "kind", "fused", "backend", "weight", "reason")]
        table += [(r.name, r.kind, "yes" if r.fused else "no", r.backend, r.weight_format, r.reason) for r in self]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, f"{len(self) - len(self.unfused)} of {len(self)} layers fused"])


def inject(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | list[str] | set[str] = "all-linear",
    quantize: str | None = None,
    strict: bool = False,
    **lora_config_kwargs: Any,
) -> PeftModel:
    """Put LoRA adapters into a model and run them on `lora_linear`: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    A plain model becomes a PeftModel with one new adapter; its base is frozen and its linear layers are replaced in
    place. In a PeftModel the LoRA layers that it has are swapped in place: names, Parameters, hooks and optimizer
    references stay what they are, and a second call changes nothing. bitsandbytes 4-bit (nf4) base layers become
    NF4Linear over the same bytes. What is not plain LoRA over a linear layer keeps PEFT's math; `injection_report` says
    which layers and why. The adapter is saved, loaded, merged and switched as with PEFT alone.

    Args:
        model: a transformers model, any nn.Module, or a PeftModel with LoRA adapters.
        r: rank. This and the next three configure a new adapter: none may be given (other than its default) for a
            PeftModel.
        lora_alpha: scale s = lora_alpha / r.
        lora_dropout: dropout probability of the low-rank branch, independent for each layer.
        target_modules: as in PEFT's LoraConfig: names, a regular expression, or "all-linear" for every linear layer but
            the output embedding.
        quantize: "nf4" stores the weights of all linear layers in double-quantized NF4, targeted or not, except the
            output embedding, modules that are trained whole, and those that the model wants in float32
            (`_keep_in_fp32_modules`); None leaves them.
        strict: raise if a targeted layer cannot be fused, before anything is quantized.
        lora_config_kwargs: other fields of PEFT's LoraConfig.

    Returns:
        The PeftModel: `model` itself if it was one.

    Raises:
        ImportError: if peft or transformers is missing.
        TypeError: if model is not an nn.Module, or an option is not a field of LoraConfig.
        ValueError: if an argument is not valid, or a weight that is to be quantized is not finite.
        InjectionError: with `strict`, naming the layers and the reasons.
    """
    _require("peft", "transformers")
    import peft

    from lora_ops import _peft_layers

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_quantize(quantize)
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    if isinstance(model, peft.PeftModel):
        given = [name for name, value in options.items() if value != _DEFAULTS[name]] + list(lora_config_kwargs)
        if given:
            raise ValueError(
                f"{given[0]}: the model is a PeftModel, whose adapter has its own configuration; "
                f"inject(model) takes no {', '.join(given)} for it"
            )
        if not isinstance(model.base_model, peft.tuners.lora.LoraModel):
            raise ValueError(f"model: expected a PeftModel with LoRA adapters, got {type(model.base_model).__name__}")
        if quantize == "nf4":
            for config in model.peft_config.values():
                _peft_layers.check_nf4_config(config, initialized=True)
            if merged := [name for name, layer in _lora_layers(model) if layer.merged]:
                raise ValueError(f"quantize: {merged[0]} has merged adapters; unmerge them first")
        if strict:
            _check_all_fusable(model, quantize)
    else:
        if any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()):
            raise ValueError(
                "model: expected a model without adapters, or a PeftModel; this one has LoRA layers that were added "
                "without a PeftModel around them"
            )
        config = _lora_config(model, options, lora_config_kwargs)
        has_nf4 = any(isinstance(m, NF4Linear) for m in model.modules())
        if has_nf4 or quantize == "nf4":
            _peft_layers.check_nf4_config(config, initialized=not has_nf4)
        peft_model = peft.get_peft_model(model, config)
        if strict:
            try:
                _check_all_fusable(peft_model, quantize)
            except InjectionError:
                peft_model.unload()
                raise
        model = peft_model
    _convert_bases(model, quantize)
    for module in model.modules():
        _peft_layers.adopt(module)
    if type(model.base_model) is peft.tuners.lora.LoraModel:
        model.base_model.__class__ = _peft_layers.LoraModel
    return model


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
    _require("peft", "transformers")
    import peft

    from lora_ops import _peft_layers

    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _peft_layers.LoraNF4Linear) and module.merged:
            raise ValueError(f"model: {name} has adapters merged into its NF4 weight; unmerge them first")
    for module in model.modules():
        _peft_layers.abandon(module)
    if type(model.base_model) is _peft_layers.LoraModel:
        model.base_model.__class__ = peft.tuners.lora.LoraModel
    return model


def injection_report(model: nn.Module) -> InjectionReport:
    """What runs fused in a model and what does not, as it stands now: one row for each LoRA or NF4 layer.

    Args:
        model: any module, injected or not.

    Returns:
        An InjectionReport: a list of LayerReport; `print` shows a table.

    Raises:
        TypeError: if model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = InjectionReport()
    inside = ""  # the layer whose parts are part of its row
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        row = _row(name, module)
        if row is not None:
            report.append(row)
            inside = name + "."
    return report


def _row(name: str, module: Any) -> LayerReport | None:
    if isinstance(module, NF4Linear):
        return LayerReport(name, "NF4Linear", *_backend(module, None, None), "nf4")
    if isinstance(module, LoRALinear):
        base = module.base_layer
        served = _backend(base, module.lora_A.weight, module.lora_B.weight)
        return LayerReport(name, "LoRALinear", *served, _weight_format(base))
    # A model without PEFT's layers is reported without importing PEFT.
    if not hasattr(module, "lora_A") or not hasattr(module, "get_base_layer"):
        return None
    from lora_ops import _peft_layers

    base = module.get_base_layer()
    kind, weight_format = type(base).__name__, _weight_format(base)
    parts = _peft_layers.fused_parts(module)
    if isinstance(parts, str):
        return LayerReport(name, kind, False, "", parts, weight_format)
    if not isinstance(module, _peft_layers.LoraLinear):
        return LayerReport(name, kind, False, "", "PEFT's own layer: call lora_ops.inject(model)", weight_format)
    if module.unfused_call is not None:
        return LayerReport(name, kind, False, "", module.unfused_call, weight_format)
    return LayerReport(name, kind, *_backend(base, parts.lora_a, parts.lora_b), weight_format)


def _weight_format(base: nn.Module) -> str:
    if isinstance(base, NF4Linear):
        return "nf4"
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and type(weight) is nn.Parameter:
        return f"dense {dtype_name(weight.dtype)}"
    return type(weight).__name__


@torch.no_grad()
def _backend(base: Any, lora_a: Tensor | None, lora_b: Tensor | None) -> tuple[bool, str, str]:
    """Whether a backend serves one row of activations in the weight's dtype; which; why a preferred one does not."""
    if isinstance(base, NF4Linear):
        weight: Any = base.quantized
        dtype, device = base.quantized_dtype, base.weight.device
    else:
        weight = weight_of(base)
        dtype, device = weight.dtype, weight.device
    x = torch.empty(1, weight.shape[1], dtype=dtype, device=device)
    bias = None if base.bias is None else base.bias.to(dtype)
    try:
        if lora_a is None:
            return True, *OPS["nf4_linear"].choose(device, (x, weight, bias))
        scale = torch.ones((), dtype=torch.float64)
        return True, *OPS["lora_linear"].choose(device, (x, weight, lora_a, lora_b, scale, bias, 0.0, None))
    except BackendError as error:
        return False, "", str(error)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'lora_ops.inject needs {", ".join(missing)}: install with  pip install "lora_ops[train]"')


def _lora_config(model: nn.Module, options: dict[str, Any], others: dict[str, Any]) -> LoraConfig:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    r, targets = options["r"], options["target_modules"]
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
    check_probability("lora_dropout", options["lora_dropout"])
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    if unknown := [name for name in others if name not in fields]:
        raise TypeError(f"{unknown[0]}: neither an argument of inject nor a field of PEFT's LoraConfig")
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    if isinstance(targets, str) and targets.lower() == "all-linear" and not isinstance(model, PreTrainedModel):
        options = {**options, "target_modules": sorted(linears - {""})}  # PEFT has the shorthand for its models only
    # Conv1D holds (K, N); PEFT sets this itself, with a warning.
    defaults = {"fan_in_fan_out": any(is_conv1d(m) for m in model.modules()), "task_type": _task_type(model)}
    return LoraConfig(**{**defaults, **options, **others})


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type, which gives the PeftModel its `generate`."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _check_all_fusable(model: PeftModel, quantize: str | None) -> None:
    from lora_ops import _peft_layers

    reasons = []
    for name, layer in _lora_layers(model):
        convertible = _is_bnb_lora(layer) and not layer.merged
        if not convertible and (reason := _peft_layers.why_not_fused(layer)):
            reasons.append(f"{name}: {reason}")
    if reasons:
        raise InjectionError("\n  ".join([f"strict: {len(reasons)} targeted layers cannot be fused:", *reasons]))


def _is_bnb_lora(layer: Any) -> bool:
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


def _convert_bases(model: PeftModel, quantize: str | None) -> None:
    """Make NF4Linears of bitsandbytes' nf4 layers and, if asked, of dense ones, one after the other."""
    for _, layer in _lora_layers(model):
        if _is_bnb_lora(layer) and not layer.merged:  # only PEFT's own class can take a merged adapter out again
            base = layer.base_layer
            q = layout.from_state_dict(base.state_dict())
            _set_base(layer, NF4Linear.from_quantized(q, base.bias).train(base.training))
    if quantize != "nf4":
        return
    from tqdm.auto import tqdm

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
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from lora_ops import _peft_layers

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
            if isinstance(module, AuxiliaryTrainingWrapper) or _peft_layers.why_not_fusable(module) is not None:
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
    from peft.tuners import lora

    layer.base_layer = base
    # What lora.Linear has and PEFT's 4-bit layer lacks; an NF4Linear holds (N, K) also where it was a Conv1D.
    layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
    if type(layer).__module__ == "peft.tuners.lora.bnb":
        layer.__class__ = lora.Linear
