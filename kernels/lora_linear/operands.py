"""What the backends of lora_linear take besides tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Adapter(NamedTuple):
    """A low-rank update scale · drop(x) Aᵀ Bᵀ.

    Attributes:
        lora_a: [R, K].
        lora_b: [N, R].
        scale: 0-d, floating, on any device.
        dropout_p: probability to drop an element of x.
        seed: of the mask, 0-d int64, or None without dropout.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    dropout_p: float = 0.0
    seed: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_a: bool
    lora_b: bool
    bias: bool


class Grads(NamedTuple):
    """The gradients, None where they were not wanted."""

    x: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
