"""Attention of 16-bit models in float32 where this CPU is slow at 16 bits: torch's backward of it takes four times as
long there as in float32 with the casts.

transformers looks its attention functions up by name. `adopt` puts one that knows the marked models in the place of
"sdpa", so that a model keeps its name for it, on which much of its code decides; other models pass through.
Imports transformers: imported only when `inject` is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.machine import DTYPES_16BIT, slow_16bit_reason
from lora_ops.runtime.trace import OpCall, open_traces, record

_MARK = "_lora_ops_attention"
_NAME = "sdpa"
_theirs: Any = None  # what stood there before, once ours is registered


def adopt(model: nn.Module) -> None:
    """Let the modules of a model with 16-bit weights on the CPU compute attention in float32 where that is faster."""
    dtypes = {p.dtype for p in model.parameters() if p.is_cpu and p.dim() > 1}
    slow = tuple(dtype for dtype in DTYPES_16BIT if dtype in dtypes and slow_16bit_reason(dtype) is not None)
    if not slow:
        return
    _register()
    for module in model.modules():
        if module._modules:  # the function is called with the module whose projections made its operands
            module.__dict__[_MARK] = slow


def abandon(model: nn.Module) -> None:
    """Undo `adopt`."""
    for module in model.modules():
        module.__dict__.pop(_MARK, None)


def _register() -> None:
    """Once in a process: what somebody registers later may call ours, which must not call it again."""
    global _theirs
    if _theirs is None:
        _theirs = ALL_ATTENTION_FUNCTIONS[_NAME]
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """softmax(scaling · Q Kᵀ + mask) V: transformers' own, in float32 inside if the module is marked and it pays."""
    slow = getattr(module, _MARK, ())
    if query.dtype not in slow or not _pays(query, key, value) or kwargs.get("cache") is not None:
        return _theirs(module, query, key, value, attention_mask, *args, **kwargs)
    if not torch.compiler.is_compiling() and open_traces:
        reason = slow_16bit_reason(query.dtype) or ""
        record(OpCall("attention in float32", "torch", "cpu", dtype_name(query.dtype), tuple(query.shape), reason))
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        kwargs["position_bias"] = position_bias.float()
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, weights = _theirs(module, query.float(), key.float(), value.float(), attention_mask, *args, **kwargs)
    return out.to(query.dtype), weights


def _pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Forwards are slow in float16 alone, and with one query there is more to widen than to multiply."""
    if not query.is_cpu or not query.dtype == key.dtype == value.dtype:
        return False
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return wants_grad or (query.dtype == torch.float16 and query.shape[-2] > 1)
