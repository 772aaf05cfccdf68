"""Frozen linear layers on `frozen_linear`, where torch's product of their dtype is slow on this CPU.

As with adapters, `adopt` assigns `module.__class__` and `abandon` assigns it back: names, Parameters and hooks stay.
Imports transformers: imported only when `inject` is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lora_ops import functional
from lora_ops.nn import weight_of
from lora_ops.quant import native_abi
from lora_ops.runtime import native
from lora_ops.runtime.checks import autocasting
from lora_ops.runtime.machine import slow_16bit_reason

_PLAIN = (nn.Parameter, Tensor)
_WORTH_A_CALL = 1 << 20  # weights from which half the time of a product is more than what the op costs


class FrozenLinear(nn.Linear):
    """nn.Linear on `frozen_linear` while its weight is frozen, on the CPU and of x's dtype, and as it was otherwise."""

    runs_frozen_linear = True

    def _get_name(self) -> str:
        return "Linear"  # in a model's repr and in the report

    def forward(self, x: Tensor) -> Tensor:
        if not _serves(self, x):
            return nn.Linear.forward(self, x)  # not super(): a hook may keep this function beyond `abandon`
        return functional.frozen_linear(x, self.weight, self.bias)


class FrozenConv1D(Conv1D):
    """transformers' Conv1D likewise; its weight lies as (K, N)."""

    runs_frozen_linear = True

    def _get_name(self) -> str:
        return "Conv1D"

    def forward(self, x: Tensor) -> Tensor:
        if not _serves(self, x):
            return Conv1D.forward(self, x)
        return functional.frozen_linear(x, self.weight.T, self.bias)


_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _serves(layer: Any, x: Tensor) -> bool:
    """Whether a call is one of the op's; sparse, nested and wrapped tensors and what does not fit are torch's."""
    weight, bias = layer.weight, layer.bias
    if type(weight) not in _PLAIN or weight.requires_grad or not (weight.is_cpu and x.is_cpu):
        return False
    if weight.dtype not in native.FLOAT_DTYPES or x.dim() == 0 or x.is_nested:
        return False
    if weight.layout is not torch.strided or x.layout is not torch.strided:
        return False
    if _is_transformed() or x.shape[-1] != weight.shape[0 if isinstance(layer, Conv1D) else 1]:
        return False
    return (x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)) or autocasting(x)


def _is_transformed() -> bool:
    """Whether torch.func, forward-mode AD or torch.jit.trace looks on: the op has no rules for them."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def adopt(model: nn.Module) -> None:
    """Put the linear layers whose frozen weights lora_ops multiplies faster than torch on `frozen_linear`, in place."""
    if not native.available():
        return
    parts = set(adapters(model))  # frozen ones too: their layers' own op multiplies with them
    for module in model.modules():
        if type(module) in _OURS and module not in parts and _is_slow(module):
            module.__class__ = _OURS[type(module)]


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are parts of adapters."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            if isinstance(part := getattr(module, name, None), nn.Module):
                yield from part.modules()


def _is_slow(layer: Any) -> bool:
    weight = layer._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.layout is torch.strided
        and weight.dim() == 2
        and not weight.requires_grad
        and weight.dtype in native.FLOAT_DTYPES
        and native_abi.takes_dense(weight_of(layer))
        and (weight.numel() >= _WORTH_A_CALL or slow_16bit_reason(weight.dtype) is not None)
    )


def abandon(model: nn.Module) -> None:
    """Give the layers of a model that `adopt` took the classes back that they had."""
    for module in model.modules():
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
