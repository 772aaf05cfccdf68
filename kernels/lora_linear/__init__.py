"""Linear layer with a low-rank update over a frozen dense or NF4 weight."""

from lora_ops.kernels.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
