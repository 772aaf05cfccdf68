"""What a model with NF4 layers says of itself: its parameter counts, and in its config how it is to be loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_ops.formats.quantization_config import bitsandbytes_config
from lora_ops.injection import counts, methods
from lora_ops.nn import NF4Linear, is_conv1d

logger = logging.getLogger("lora_ops")


def describe(model: Any) -> None:
    """Let counts, config and what PEFT adds later tell of the NF4 layers that a model has; nothing if it has none."""
    if not any(isinstance(m, NF4Linear) for m in model.modules()):
        return
    methods.watch()
    counts.count_as_dense(model)
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(root, "config") and hasattr(root, "save_pretrained"):
        root.config.quantization_config = _quantization_config(root)


def forget(model: Any) -> None:
    """Take back what describes quantized layers, once a model has none."""
    if quantizer := getattr(model, "hf_quantizer", None):  # of a model that transformers loaded with bitsandbytes
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        for name in ("quantization_config", "_is_quantized"):
            getattr(config, "__dict__", {}).pop(name, None)
    for name in ("is_loaded_in_4bit", "num_parameters"):
        model.__dict__.pop(name, None)


def _quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model, as it will be saved when its adapters are merged or unloaded."""
    layers = dict(linear_layers(model))
    nf4: dict[str, NF4Linear] = {name: m for name, m in layers.items() if isinstance(m, NF4Linear)}
    if own := [name for name, m in nf4.items() if m.source_cls is not nn.Linear and not is_conv1d(m.source_cls)]:
        logger.warning(
            "transformers cannot load %d NF4 layers back, which replaced a class of the model's own (%s, ...): save "
            "lora_ops.merge(model) instead", len(own), own[0],
        )  # fmt: skip
    (compute_dtype, _), *_ = Counter(m.quantized_dtype for m in nf4.values()).most_common()
    return bitsandbytes_config(
        nf4, layers.keys() - nf4.keys(), double_quant=all(m.quantized.nested for m in nf4.values()),
        compute_dtype=compute_dtype,
    )  # fmt: skip


def linear_layers(module: Any, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A model's linear layers under the names that they have without adapters."""
    module = getattr(module, "original_module", module)  # of a module that is trained whole
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    if isinstance(module, nn.Linear) or is_conv1d(module):
        yield name, module
    for child_name, child in module.named_children():
        yield from linear_layers(child, f"{name}.{child_name}" if name else child_name)
