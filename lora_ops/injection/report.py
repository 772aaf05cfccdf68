"""What of a model runs fused and what does not, one row a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops._checks import dtype_name
from lora_ops._dispatch import OPS, BackendError
from lora_ops.nn import LoRALinear, NF4Linear, weight_of


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
    from lora_ops.injection import peft_layers

    base = module.get_base_layer()
    kind, weight_format = type(base).__name__, _weight_format(base)
    parts = peft_layers.fused_parts(module)
    if isinstance(parts, str):
        return LayerReport(name, kind, False, "", parts, weight_format)
    if not isinstance(module, peft_layers.LoraLinear):
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
