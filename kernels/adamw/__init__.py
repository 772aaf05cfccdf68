"""AdamW's update of many tensors in one call, with 32- or 8-bit states."""

from lora_ops.kernels.adamw.op import BLOCK_SIZE, Slice, adamw_, constants
from lora_ops.kernels.adamw.table import Again, Table

__all__ = ["BLOCK_SIZE", "Again", "Slice", "Table", "adamw_", "constants"]
