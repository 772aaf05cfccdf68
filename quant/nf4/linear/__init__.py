"""Linear layer over an NF4 weight."""

from lora_ops.quant.nf4.linear.op import nf4_linear

__all__ = ["nf4_linear"]
