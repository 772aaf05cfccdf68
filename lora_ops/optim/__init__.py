"""Optimizers: AdamW with 32- or 8-bit states that may exceed the fast memory."""

from __future__ import annotations

from lora_ops.optim.adamw import AdamW
from lora_ops.optim.aliases import AdamW8bit, PagedAdamW, PagedAdamW8bit
from lora_ops.optim.groups import embedding_weights
from lora_ops.optim.huggingface import trainer_optimizer
from lora_ops.optim.memory import OptimizerMemory, optimizer_memory
from lora_ops.paging.errors import PagingError
from lora_ops.paging.stats import PagingStats

__all__ = [
    "AdamW",
    "AdamW8bit",
    "OptimizerMemory",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagingError",
    "PagingStats",
    "embedding_weights",
    "optimizer_memory",
    "trainer_optimizer",
]
