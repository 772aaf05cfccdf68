"""Linear layer over a frozen weight."""

from lora_ops.kernels.frozen_linear.op import frozen_linear

__all__ = ["frozen_linear"]
