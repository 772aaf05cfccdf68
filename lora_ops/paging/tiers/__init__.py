"""Where extents live when they are not in the fast tier, and how they get there and back."""

from lora_ops.paging.tiers.base import Tier, Transfer
from lora_ops.paging.tiers.cuda import CudaDevice, Device
from lora_ops.paging.tiers.file import FileTier
from lora_ops.paging.tiers.pinned import PinnedTier

__all__ = ["CudaDevice", "Device", "FileTier", "PinnedTier", "Tier", "Transfer"]
