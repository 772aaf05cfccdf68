"""AdamW's update of many tensors in one call, with 32- or 8-bit states."""

from lora_ops.kernels.adamw.op import BLOCK_SIZE, Slice, adamw_, constants
from lora_ops.kernels.adamw.table import SliceRow, SliceTable, StepValues

__all__ = ["BLOCK_SIZE", "Slice", "SliceRow", "SliceTable", "StepValues", "adamw_", "constants"]
