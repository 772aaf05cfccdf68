"""Drop-in modules over the ops, usable without PEFT: a linear layer in NF4, and one with a low-rank update."""

from lora_ops.nn.dense import is_conv1d, weight_of
from lora_ops.nn.lora_linear import LoRALinear, check_quantize
from lora_ops.nn.nf4_linear import NF4Linear, add_to_nf4, in_compute_dtype

__all__ = ["LoRALinear", "NF4Linear", "add_to_nf4", "check_quantize", "in_compute_dtype", "is_conv1d", "weight_of"]
