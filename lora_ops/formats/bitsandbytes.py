"""bitsandbytes' 4-bit layers, known without importing bitsandbytes; quant/nf4/state_dict.py reads what they save."""

from __future__ import annotations

from typing import Any


def is_linear4bit(module: object) -> bool:
    """Whether `module` is a bitsandbytes 4-bit layer; told by its name, so as not to import bitsandbytes."""
    return any(c.__name__ == "Linear4bit" and c.__module__ == "bitsandbytes.nn.modules" for c in type(module).__mro__)


def why_not_nf4(linear4bit: Any) -> str | None:
    """Why a bitsandbytes 4-bit layer cannot be computed with as it stands, or None if it can.

    Args:
        linear4bit: for which `is_linear4bit` holds.
    """
    weight = linear4bit.weight
    if (quant_type := getattr(weight, "quant_type", None)) != "nf4":
        return f"bitsandbytes {quant_type}: lora_ops has nf4 only; load with bnb_4bit_quant_type='nf4'"
    if getattr(weight, "quant_state", None) is None or weight.is_meta:
        return "a bitsandbytes layer without quantized values; load a checkpoint, or move the model to its device"
    return None


def is_repacked(linear4bit: Any) -> bool:
    """Whether a forward in eval() has packed the layer anew and rounded its scales to bfloat16.

    bitsandbytes 0.50 does so on CPUs with AVX-512-BF16. In the state dict the order of the codes is the old one again;
    scales stay rounded, and those that are not double-quantized transposed.
    """
    return bool(getattr(getattr(linear4bit.weight, "quant_state", None), "packing_format_for_cpu", False))
