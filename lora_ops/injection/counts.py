"""Parameter counts of models with NF4 layers: those of the dense model, as they are with bitsandbytes.

PEFT and transformers count the elements of Parameters, and know bitsandbytes' packed ones by their class alone. Bytes
(`get_memory_footprint`) need no help: they are those of the tensors held.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from lora_ops.nn import NF4Linear


def hidden_parameters(model: nn.Module) -> int:
    """Weights of the dense model less the elements that stand for them: Σ N · K - (codes + scales)."""
    shared = {id(m.weight): m for m in model.modules() if isinstance(m, NF4Linear)}  # a weight counts once
    return sum(
        layer.out_features * layer.in_features
        - sum(p.numel() for name, p in layer.named_parameters(recurse=False) if name != "bias")
        for layer in shared.values()
    )


def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`PreTrainedModel.num_parameters` of the dense model."""
    counted = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + hidden_parameters(self)


def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
    """`PeftModel.get_nb_trainable_parameters` of the dense model."""
    trainable, counted = type(self).get_nb_trainable_parameters(self)
    return trainable, counted + hidden_parameters(self)


def count_as_dense(model: nn.Module) -> None:
    """Let a model and the models in it count NF4 layers as what they stand for.

    The methods go to the instances, whose classes are what other libraries compare and save by name.
    """
    for module in model.modules():
        for method in (num_parameters, get_nb_trainable_parameters):
            if callable(getattr(type(module), method.__name__, None)):
                module.__dict__[method.__name__] = MethodType(method, module)
