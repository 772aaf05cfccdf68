"""Every op's public function."""

from lora_ops.kernels.frozen_linear import frozen_linear
from lora_ops.kernels.lora_linear import lora_linear
from lora_ops.quant.blockwise8 import dequantize_blockwise8, quantize_blockwise8
from lora_ops.quant.nf4.codec import dequantize_nf4, quantize_nf4
from lora_ops.quant.nf4.linear import nf4_linear

__all__ = [
    "dequantize_blockwise8",
    "dequantize_nf4",
    "frozen_linear",
    "lora_linear",
    "nf4_linear",
    "quantize_blockwise8",
    "quantize_nf4",
]
