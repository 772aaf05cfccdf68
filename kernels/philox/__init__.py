"""The dropout mask that every backend draws alike."""

from lora_ops.kernels.philox.reference import dropout_mask, keep_scale, threshold

__all__ = ["dropout_mask", "keep_scale", "threshold"]
