"""Linear layers of torch and transformers, as the modules here take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_conv1d(module: object) -> bool:
    """Whether `module` is transformers' Conv1D, or that class: a linear layer with its weight stored as (K, N); told by
    its name, so that nothing imports transformers."""
    cls = module if isinstance(module, type) else type(module)
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in cls.__mro__)


def weight_of(linear: Any) -> Tensor:
    """The weight [N, K] of an nn.Linear, or of a Conv1D, as a view."""
    if is_conv1d(linear):
        return linear.weight.T
    if isinstance(linear, nn.Linear):
        return linear.weight
    raise TypeError(f"linear: expected an nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
