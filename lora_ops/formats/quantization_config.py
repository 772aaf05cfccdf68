"""What config.json says of a model whose linear layers are in NF4, so that transformers loads it with bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from lora_ops.runtime.checks import dtype_name


def bitsandbytes_config(
    nf4: Iterable[str], dense: Iterable[str], *, double_quant: bool, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` under which transformers' `from_pretrained` makes a Linear4bit of just the NF4 layers.

    Args:
        nf4: names of the linear layers in NF4.
        dense: names of all others, which transformers must leave alone.
        double_quant: whether absmax is itself quantized; each layer's own state decides when it is loaded.
        compute_dtype: in which bitsandbytes multiplies.

    Returns:
        The fields of transformers' BitsAndBytesConfig, as JSON has them.
    """
    nf4 = list(nf4)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(_skip(name, nf4) for name in dense),
    }


def _skip(name: str, nf4: list[str]) -> str:
    """The entry that skips the layer `name` and none in NF4.

    transformers takes an entry for a pattern at the start of a name and for the end of one ("fc" skips "mlp.fc" too);
    other readers take it for a name, so it stays one where it can.
    """
    pattern = re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")
    return f"^{name}$" if any(pattern.match(other) or other.endswith(name) for other in nf4) else name
