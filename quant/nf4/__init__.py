"""The NF4 format: code book and tensor, codec, products, what layers save, and how kernels take it."""

from lora_ops.quant.nf4.tensor import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    NF4_CODE,
    NF4Tensor,
    check_block_size,
    check_nf4,
    nf4_code,
    nf4_thresholds,
)

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK_SIZE",
    "NF4_CODE",
    "NF4Tensor",
    "check_block_size",
    "check_nf4",
    "nf4_code",
    "nf4_thresholds",
]
