"""What of a model runs fused and what does not, one row a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ops.formats import bitsandbytes as layout
from lora_ops.injection.dense import ModelBytes, model_bytes
from lora_ops.injection.gathered import as_gathered, under_fsdp2
from lora_ops.injection.reads import shorten, weight_reads
from lora_ops.kernels.lora_linear.operands import Adapter
from lora_ops.nn import LoRALinear, NF4Linear, weight_of
from lora_ops.runtime.backends import BackendError
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.dispatch import OPS


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
        state: "fused"; "unfused", PEFT's math runs; or why no adapter runs in the layer: "no active adapter",
            "disabled", "merged", "weight read", the model's code reads the weight instead of calling the layer, or
            "never called", though forwards of the model have called others.
    """

    name: str
    kind: str
    fused: bool
    backend: str
    reason: str
    weight_format: str
    state: str = "fused"


class InjectionReport(list[LayerReport]):
    """The rows of a model's report; `str()` is a table, with lines of totals.

    Attributes:
        weights: what the whole model takes, and what of it is dense and why.
        frozen: names of layers without a row that run on `frozen_linear`, where torch is slower on this CPU.
    """

    def __init__(
        self, rows: Iterable[LayerReport] = (), weights: ModelBytes | None = None, frozen: Iterable[str] = ()
    ) -> None:
        super().__init__(rows)
        self.weights = weights or ModelBytes(0, 0, 0, ())
        self.frozen = tuple(frozen)

    @property
    def unfused(self) -> list[LayerReport]:
        """The rows in which PEFT's math runs."""
        return [row for row in self if row.state == "unfused"]

    def __str__(self) -> str:
        weights = f"weights {self.weights}"
        if not self:
            return f"no LoRA or NF4 layer in this model\n{weights}"
        table = [("layer", "kind", "state", "backend", "weight", "reason")]
        table += [(r.name, r.kind, r.state, r.backend, r.weight_format, r.reason) for r in self]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        states = Counter(row.state for row in self)
        counts = [f"{states.pop('fused', 0)} of {len(self)} layers fused", *(f"{n} {s}" for s, n in states.items())]
        if self.frozen:
            counts.append(f"{len(self.frozen)} other layers on frozen_linear ({shorten(self.frozen)})")
        return "\n".join([*lines, ", ".join(counts), weights])


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
    sharded = under_fsdp2(model)
    rows: dict[nn.Module, LayerReport] = {}
    frozen: list[str] = []
    inside = ""  # the layer whose parts are part of its row, but for adapters on them
    for name, module in model.named_modules():
        if inside and name.startswith(inside) and not hasattr(module, "get_base_layer"):
            continue
        with as_gathered(module) if sharded and _has_row(module) else nullcontext():
            row = _row(name, module)
        if row is not None:
            rows[module] = row
            inside = name + "."
        elif getattr(module, "runs_frozen_linear", False):
            frozen.append(name)
    _find_adapters_without_effect(model, rows)
    with as_gathered(model, "meta"):
        return InjectionReport(rows.values(), model_bytes(model), frozen)


def _find_adapters_without_effect(model: Any, rows: dict[nn.Module, LayerReport]) -> None:
    """Set the state of adapters that are active and that no forward of the model runs."""
    active = {m: row for m, row in rows.items() if hasattr(m, "get_base_layer") and row.state in ("fused", "unfused")}
    root = model.get_base_model() if hasattr(model, "get_base_model") else model  # not PEFT's code around it
    reads = weight_reads(root) if active else {}
    last_call = max((getattr(m, "called", 0) for m in rows), default=0)
    for module, row in active.items():
        read = reads.get(module)
        if read is not None and not read.called:
            rows[module] = replace(row, fused=False, backend="", state="weight read", reason=read.reason)
        elif getattr(module, "called", None) == 0 and last_call >= module.adopted and not _traced():  # type: ignore[operator]
            reason = "forwards of the model call other layers, not this one"
            rows[module] = replace(row, fused=False, backend="", state="never called", reason=reason)


def _traced() -> bool:
    from lora_ops.injection import peft_layers

    return peft_layers.traced


def _has_row(module: Any) -> bool:
    # A model without PEFT's layers is reported without importing PEFT.
    peft_layer = hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
    return isinstance(module, (NF4Linear, LoRALinear)) or peft_layer


def _row(name: str, module: Any) -> LayerReport | None:
    if isinstance(module, NF4Linear):
        return _served(name, "NF4Linear", _backend(module, None, None), "nf4")
    if isinstance(module, LoRALinear):
        base = module.base_layer
        served = _backend(base, module.lora_A.weight, module.lora_B.weight)
        return _served(name, "LoRALinear", served, _weight_format(module, base))
    if layout.is_linear4bit(module):
        reason = layout.why_not_nf4(module) or "bitsandbytes' own layer: call lora_ops.inject(model)"
        return LayerReport(name, type(module).__name__, False, "", reason, _weight_format(module, module), "unfused")
    if not _has_row(module):
        return None
    from lora_ops.injection import peft_layers

    base = module.get_base_layer()
    kind, weight_format = base._get_name(), _weight_format(module, base)
    if (inactive := peft_layers.inactive_state(module)) is not None:
        state, reason = inactive
        return LayerReport(name, kind, False, "", reason, weight_format, state)
    parts = peft_layers.fused_parts(module)
    if isinstance(parts, str):
        reason = parts
    elif not isinstance(module, peft_layers.LoraLinear):
        reason = "PEFT's own layer: call lora_ops.inject(model)"
    elif module.unfused_call is not None:
        reason = module.unfused_call
    else:
        return _served(name, kind, _backend(base, parts.lora_a, parts.lora_b), weight_format)
    return LayerReport(name, kind, False, "", reason, weight_format, "unfused")


def _served(name: str, kind: str, served: tuple[bool, str, str], weight_format: str) -> LayerReport:
    return LayerReport(name, kind, *served, weight_format, "fused" if served[0] else "unfused")


def _weight_format(layer: Any, base: nn.Module) -> str:
    """Of the parameter that the adapter changes: PEFT's names it where it is not a layer's weight."""
    if isinstance(base, NF4Linear):
        return "nf4"
    weight = getattr(base, getattr(layer, "parameter_name", None) or "weight", None)
    if weight is None:  # such as nn.MultiheadAttention
        weight = next((p for p in base.parameters() if p.dim() > 1), None)
    if weight is None:
        return "none"
    torchs_own = type(weight).__module__.partition(".")[0] == "torch"  # Parameter, Tensor, DTensor
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and torchs_own:
        return f"dense {dtype_name(weight.dtype)}"
    return type(weight).__name__


@torch.no_grad()
def _backend(base: Any, lora_a: Tensor | None, lora_b: Tensor | None) -> tuple[bool, str, str]:
    """Whether a backend serves one row of activations in the weight's dtype; which; why a preferred one does not."""
    if isinstance(base, NF4Linear):
        weight: Any = base.quantized
        dtype, device = base.compute_dtype or base.quantized_dtype, base.weight.device
    else:
        weight = weight_of(base)
        dtype, device = weight.dtype, weight.device
    x = torch.empty(1, weight.shape[1], dtype=dtype, device=device)
    bias = None if base.bias is None else base.bias.to(dtype)
    try:
        if lora_a is None or lora_b is None:
            return True, *OPS["nf4_linear"].choose(x, {"x": x, "q": weight, "bias": bias})
        adapter = Adapter(lora_a, lora_b, torch.ones((), dtype=torch.float64))
        operands = {"x": x, "weight": weight, "adapter": adapter, "bias": bias}
        return True, *OPS["lora_linear"].choose(x, operands)
    except BackendError as error:
        return False, "", str(error)
