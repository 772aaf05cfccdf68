"""8-bit blockwise codes with the dynamic map: nested NF4 scales now, optimizer states later."""

from lora_ops.quant.blockwise8.op import dequantize_blockwise8, quantize_blockwise8

__all__ = ["dequantize_blockwise8", "quantize_blockwise8"]
