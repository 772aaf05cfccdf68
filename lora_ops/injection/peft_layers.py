"""PEFT's LoRA layers with their forward on `lora_linear`. It is imported only when `inject` or `quantize` is called.

The classes hold no state that PEFT's do not: `inject` assigns `module.__class__`, so that names, Parameters, hooks and
optimizer references stay what they are, and `eject` assigns it back. Whatever is not plain LoRA runs PEFT's own math.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ops import functional
from lora_ops.injection import attention, frozen_layers, methods
from lora_ops.injection.frozen_layers import FrozenConv1D, FrozenLinear
from lora_ops.injection.linears import why_not_linear
from lora_ops.nn import NF4Linear, add_to_nf4, in_compute_dtype
from lora_ops.quant import native_abi
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime import native
from lora_ops.runtime.checks import autocasting, dtype_name

logger = logging.getLogger("lora_ops")


class Parts(NamedTuple):
    """What the fused forward of a layer reads."""

    base: nn.Module
    weight: Tensor  # of the base
    lora_a: Tensor
    lora_b: Tensor
    dropout: nn.Module
    scale: float


def why_not_fusable(layer: nn.Module) -> str | None:
    """Why a layer of PEFT's cannot become one of ours, or None: what its class and its base layer say."""
    if type(layer) not in (LoraLinear, LoraNF4Linear, lora.Linear):
        return f"lora_ops fuses PEFT's lora.Linear only, this is a {_qualname(layer)}"
    base = layer._modules["base_layer"]
    if type(base) in _BASES or (type(layer) is not lora.Linear and type(base) in _alike):
        return None
    if isinstance(base, nn.Linear) and why_not_linear(base) is None:
        _alike.add(type(base))
        return None
    return f"base layer: expected nn.Linear, Conv1D or NF4Linear, got {_qualname(base)}"


def inactive_state(layer: LoraLayer) -> tuple[str, str] | None:
    """The state in which a layer, fusable or not, has no adapter to run, and words for it; None in another state."""
    if layer.disable_adapters:
        return "disabled", _DISABLED
    if layer.merged_adapters:
        return "merged", _MERGED
    if not any(name in layer.scaling for name in layer.active_adapters):
        return "no active adapter", _NO_ADAPTER
    return None


def why_not_fused(layer: LoraLayer) -> str | None:
    """Why a forward of the layer in its present state runs PEFT's math, or None if `lora_linear` runs it."""
    parts = fused_parts(layer)
    return parts if isinstance(parts, str) else None


def own_products(model: nn.Module) -> set[nn.Module]:
    """The dense layers on the CPU whose products are, in their present state, lora_ops' own and not torch's."""
    if not native.available():
        return set()
    fused = (p for m in model.modules() if isinstance(m, LoraLayer) and isinstance(p := fused_parts(m), Parts))
    own = {p.base for p in fused if p.weight.dtype in native.FLOAT_DTYPES and native_abi.takes_dense(p.weight)}
    return own | {m for m in model.modules() if isinstance(m, (FrozenLinear, FrozenConv1D))}


def fused_parts(layer: LoraLayer) -> Parts | str:
    """What the fused forward needs, or why there is none in the layer's present state.

    It runs at each call, so it reads `_modules` and `_parameters`: nn.Module's attribute access takes 1 µs apiece.
    """
    if reason := why_not_fusable(layer):
        return reason
    if layer.disable_adapters:
        return _DISABLED
    if layer.merged_adapters:
        return _MERGED
    modules = layer._modules
    adapters = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in adapters]
    if len(active) != 1:
        return f"{len(active)} active adapters: {', '.join(active)}" if active else _NO_ADAPTER
    (name,) = active
    if name in layer.lora_variant:
        return f"adapter {name!r} is not plain LoRA: {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias.get(name, False):
        return f"adapter {name!r} has lora_bias"
    base, lora_a, lora_b = modules["base_layer"], adapters[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for part, module, types in (
        ("base layer", base, (*_BASES, *_alike)),
        ("lora_A", lora_a, _ADAPTERS),
        ("lora_B", lora_b, _ADAPTERS),
        ("lora_dropout", dropout, _DROPOUTS),
    ):
        if type(module) not in types:
            return f"{part}: expected {' or '.join(t.__name__ for t in types)}, got {_qualname(module)}"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return f"{part} has hooks or a forward of its own, which the fused op would not call"
    parts = Parts(base, _weight(base), _weight(lora_a), _weight(lora_b), dropout, layer.scaling[name])
    for part, t in (("base layer", parts.weight), ("lora_A", parts.lora_a), ("lora_B", parts.lora_b)):
        if type(t) not in _PLAIN:
            return f"{part}: expected a plain tensor as weight, got {_qualname(t)}"
    if parts.weight.requires_grad:
        return "base layer: its weight requires a gradient, which lora_linear does not compute"
    return parts


_DISABLED = "adapters are disabled: only the base layer runs"
_MERGED = "adapters are merged: only the base layer runs"
_NO_ADAPTER = "no active adapter"
_BASES = (nn.Linear, Conv1D, NF4Linear, FrozenLinear, FrozenConv1D)
_alike: set[type] = set()  # subclasses of nn.Linear that were seen to compute what it does
_ADAPTERS = (nn.Linear,)
_DROPOUTS = (nn.Identity, nn.Dropout)
_PLAIN = (nn.Parameter, Tensor)


def _weight(module: Any) -> Tensor:
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight  # FSDP1 puts plain tensors in the place of Parameters


def _qualname(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _why_not_this_call(parts: Parts, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call, on a layer that is otherwise fused, runs PEFT's math."""
    given = [key for key, value in kwargs.items() if value is not None]
    if args or given:  # adapter_names mixes adapters in one batch
        return f"the call has arguments beside x: {', '.join(given) or len(args)}"
    dtype = getattr(parts.base, "compute_dtype", None) or x.dtype
    if not x.dtype.is_floating_point:
        return f"x: expected a floating dtype, got {dtype_name(x.dtype)}"
    if autocasting(x):
        return None
    if parts.weight.dtype != dtype and type(parts.base) is not NF4Linear:
        return f"x is {dtype_name(dtype)} and the base layer {dtype_name(parts.weight.dtype)}"
    for part, t in (("lora_A", parts.lora_a), ("lora_B", parts.lora_b)):
        if t.dtype != dtype and (t.dtype != torch.float32 or dtype == torch.float64):
            return f"{part} is {dtype_name(t.dtype)} under {dtype_name(dtype)} activations"
    return None


_told: set[str] = set()
traced = False  # whether torch.compile has traced a forward in this process; its later calls leave no mark
_adopted = 0  # layers adopted in this process


@torch.compiler.assume_constant_result
def _note_traced() -> None:
    global traced
    traced = True


@torch.compiler.assume_constant_result  # called while tracing, so that it breaks no graph
def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("a LoRA layer runs PEFT's math instead of lora_linear: %s", reason)


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer over nn.Linear or Conv1D, on `lora_linear`."""

    unfused_call: str | None = None  # why the last call ran PEFT's math, if the layer's state does not tell
    # In the count of layers adopted so far: when this one was, and when it was last called (0: never). A layer counts
    # as never called once others of its model were called after it was there.
    adopted = called = 0

    def _get_name(self) -> str:
        return "Linear"  # PEFT's: its repr, and with it `get_layer_status`, says "lora.Linear"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            _note_traced()  # a mark on the layer would be guarded on, and everything compiled a second time
        elif self.called != _adopted:
            self.called = _adopted
        parts = fused_parts(self)
        if isinstance(parts, str):
            if parts not in (_DISABLED, _MERGED, _NO_ADAPTER):  # else there is nothing to fuse
                _tell_once(parts)
            return super().forward(x, *args, **kwargs)
        reason = _why_not_this_call(parts, x, args, kwargs)
        if self.unfused_call != reason:
            self.unfused_call = reason
        if reason is not None:
            _tell_once(reason)
            return super().forward(x, *args, **kwargs)
        return _fused(parts, x)


def _fused(parts: Parts, x: Tensor) -> Tensor:
    base, dropout, dtype = parts.base, parts.dropout, x.dtype
    bias: Any = base.bias
    if isinstance(base, NF4Linear):
        base._check_not_empty()
        x = in_compute_dtype(base, x)
        weight: Tensor | NF4Tensor = base.quantized
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
    else:
        weight = parts.weight.T if isinstance(base, Conv1D) else parts.weight
    dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    y = functional.lora_linear(x, weight, parts.lora_a, parts.lora_b, scale=parts.scale, bias=bias, dropout_p=dropout_p)
    return y if getattr(base, "compute_dtype", None) is None else y.to(dtype)


class LoraNF4Linear(LoraLinear):
    """PEFT's LoRA layer over NF4Linear, on `lora_linear`; merges by quantizing anew and unmerges to the same bytes."""

    # The weight and bias before `merge`. A class attribute: a layer that `inject` adopts has none of its own.
    _unmerged: tuple[NF4Tensor, Tensor | None] | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # an NF4Linear holds (N, K), whatever the other targets of the adapter do

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        check_nf4_config(config)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def orthogonal_init(self, adapter_name: str) -> None:
        """Draw lora_A and lora_B as PEFT does, which asks the base for its dtype; codes have none to give."""
        base: Any = self._modules["base_layer"]
        shape = nn.Linear(self.in_features, self.out_features, device="meta", dtype=base.quantized_dtype)
        self._modules["base_layer"] = shape
        try:
            super().orthogonal_init(adapter_name)
        finally:
            self._modules["base_layer"] = base

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Where new adapters go, and in which dtype unless PEFT makes them float32; not that of the codes."""
        return base_layer.weight.device, getattr(base_layer, "compute_dtype", None) or base_layer.quantized_dtype

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base's weight: W ← quantize(dequantize(W) + Σ scale · B A), rounded once for them all.

        Args:
            safe_merge: refuse a bias that is not finite; a weight is refused either way, since NF4 cannot hold it.
            adapter_names: which ones; the active ones if None.

        Raises:
            ValueError: if a sum is not finite; the layer is left as it was.
            RuntimeError: if an adapter has a bias and the base layer none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base: NF4Linear = self.get_base_layer()
        original, original_bias = self._unmerged or (base.quantized, None if base.bias is None else base.bias.data)
        delta, bias = torch.zeros(original.shape, device=original.device), original_bias
        for name in [*self.merged_adapters, *names]:
            adapter = self.get_delta_weight(name).float()
            _check_finite(name, adapter)
            delta += adapter
            if self.lora_bias.get(name, False):
                if bias is None:
                    raise RuntimeError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                bias = bias + (self.lora_B[name].bias * self.scaling[name]).to(bias.dtype)
                if safe_merge:
                    _check_finite(name, bias)
        merged = add_to_nf4(original, delta)
        base.quantized = merged
        if bias is not None:
            base.bias.data = bias
        self._unmerged = original, original_bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base's weight and bias to the bytes that they had before `merge`."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: NF4Linear = self.get_base_layer()
        original, bias = self._unmerged
        base.quantized = original.to(base.weight.device)
        if bias is not None:
            base.bias.data = bias.to(base.bias.device, base.bias.dtype)
        self.merged_adapters.clear()
        self._unmerged = None


def _check_finite(adapter: str, t: Tensor) -> None:
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


_VARIANTS = (
    "use_dora",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


# Those that leave the base's weight alone: EVA starts from activations, orthogonal from shapes.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def check_nf4_config(config: Any, *, initialized: bool = False) -> None:
    """Raise ValueError unless an adapter of this LoraConfig can stand on an NF4 base.

    Args:
        config: the adapter's.
        initialized: whether the adapter is drawn already, from the dense weight.
    """
    if variants := [name for name in _VARIANTS if getattr(config, name, None)]:
        raise ValueError(f"{variants[0]}: an NF4 base layer takes plain LoRA adapters only")
    init = config.init_lora_weights
    if init == "mica" or (not initialized and init not in _INITS):
        raise ValueError(
            f"init_lora_weights: expected {', '.join(map(repr, _INITS))} over an NF4 base layer, got {init!r}, which "
            'changes the dense weight: give it to the dense model and then call inject(model, quantize="nf4"), or load '
            "an adapter that was saved with path_initial_model_for_weight_conversion"
        )


class LoraModel(lora.LoraModel):
    """PEFT's LoraModel, whose later adapters get our layers too."""

    def _check_new_adapter_config(self, config: Any) -> None:
        """PEFT calls this before it changes anything."""
        super()._check_new_adapter_config(config)
        targets, kept = config.target_modules, tuple(config.modules_to_save or ())
        for name, module in self.model.named_modules():
            if not isinstance(module, NF4Linear):
                continue
            name = name.removesuffix(".base_layer")
            if any(f"{name}."[:end].endswith(kept) for end, c in enumerate(f"{name}.") if c == "."):
                raise methods.untrainable(name, module)
            if targets == "all-linear" or self._check_target_module_exists(config, name):
                check_nf4_config(config)

    def _check_merge_allowed(self) -> None:
        """PEFT calls this before it merges or unloads."""
        super()._check_merge_allowed()
        held: dict[Tensor, str] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, NF4Linear) and name.endswith(".base_layer"):
                name = name.removesuffix(".base_layer")
                if (other := held.setdefault(module.weight, name)) != name:
                    raise ValueError(
                        f"merge: {other} and {name} share one NF4 weight, which cannot hold the update of each; "
                        "lora_ops.merge(model) gives each a dense one"
                    )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """What is left of the model is as it was before there were adapters."""
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        frozen_layers.abandon(model)
        attention.abandon(model)
        return model

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) is NF4Linear and kwargs.get("parameter_name") is None:
            kwargs.pop("device_map", None)
            return adopt(LoraNF4Linear(target, adapter_name, lora_config, **kwargs))
        return adopt(lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))


def adopt(layer: nn.Module) -> nn.Module:
    """Make PEFT's layer one of ours where it can be, in place."""
    global _adopted
    if why_not_fusable(layer) is None:
        if not getattr(layer, "adopted", 0):
            _adopted += 1
            layer.adopted = _adopted  # type: ignore[assignment]
        layer.__class__ = LoraNF4Linear if isinstance(layer.base_layer, NF4Linear) else LoraLinear
        methods.allow_merge(layer)
    return layer


def abandon(layer: nn.Module) -> None:
    """Make a layer of ours PEFT's again, in place."""
    if isinstance(layer, LoraLinear):
        layer.__class__ = lora.Linear
        for name in ("unfused_call", "adopted", "called", "_unmerged"):
            layer.__dict__.pop(name, None)
        if isinstance(layer.base_layer, NF4Linear):
            methods.refuse_merge(layer)
