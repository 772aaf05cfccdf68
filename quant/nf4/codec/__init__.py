"""NF4 quantize and dequantize."""

from lora_ops.quant.nf4.codec.op import dequantize_nf4, quantize_nf4

__all__ = ["dequantize_nf4", "quantize_nf4"]
