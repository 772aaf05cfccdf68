"""Which modules are linear layers, y = x Wᵀ + b: by class, or by what their forward computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lora_ops.nn import NF4Linear, is_conv1d

_COMMON = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KNOWN = (
    "torch.nn.modules.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "lora_ops.injection.frozen_layers.FrozenLinear",
    "lora_ops.injection.frozen_layers.FrozenConv1D",
)


def why_not_linear(module: Any) -> str | None:
    """Why a module cannot be replaced by a linear layer over its weight and bias, or None if it can.

    A subclass of nn.Linear can where its forward is nn.Linear's, or gives the same numbers in float64. Such a forward
    runs on a copy of the module with a weight of a few random elements.
    """
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"{_qualname(module)} is not a linear layer"
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return f"{_qualname(module)} has no plain tensor as weight"
    if _qualname(module) not in _KNOWN and type(module) is not NF4Linear and not _computes_linear(module):
        return f"the forward of {_qualname(module)} is not that of nn.Linear"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks) or "forward" in module.__dict__:
        return "it has hooks or a forward of its own"
    return None


@torch.no_grad()
def returns_features(module: Any) -> bool:
    """Whether a linear layer returns one tensor [..., N] of x [..., K], so that PEFT can add a low-rank update to it.

    A subclass of nn.Linear with a forward of its own is called, with one row of ones: routers return tuples, grouped
    layers another shape. Layers whose weight is not a plain tensor in a common dtype are another library's to know.
    """
    weight = module._parameters.get("weight")
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if not own or type(weight) is not nn.Parameter or weight.dtype not in _COMMON:
        return True
    x = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device)
    try:
        with torch.random.fork_rng(devices=[]):  # some routers draw noise
            y = type(module).forward(module, x)
    except Exception:  # it wants another input than a linear layer
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, module.out_features)


def _qualname(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _computes_linear(module: Any) -> bool:
    cls = type(module)
    parts = set(module._parameters), set(module._buffers), set(module._modules)
    if not isinstance(module, nn.Linear) or parts != ({"weight", "bias"}, set(), set()):
        return False
    if cls.__call__ is not nn.Module.__call__:
        return False
    if cls.forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    n, k = 5, 3
    probe = copy.copy(module)
    probe.__dict__["in_features"], probe.__dict__["out_features"] = k, n
    weight = nn.Parameter(torch.randn(n, k, generator=generator, dtype=torch.float64))
    bias = None
    if module.bias is not None:
        bias = nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64))
    probe.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    x = torch.randn(2, 4, k, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = nn.functional.linear(x, weight, bias)
            found = [cls.forward(probe.train(mode), x) for mode in (True, False)]
        return all(isinstance(y, torch.Tensor) and torch.allclose(y, expected, rtol=1e-12, atol=0) for y in found)
    except Exception:  # another library's code, in a place for which it was not written: not proven
        return False
