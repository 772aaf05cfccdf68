"""A layer that FSDP2 has sharded, as its forward sees it: with whole, plain Parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_ops.runtime.sharding import is_sharded


def under_fsdp2(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on a part of the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


@contextmanager
def as_gathered(layer: nn.Module, device: str | None = None) -> Iterator[None]:
    """Have Parameters that FSDP2 gathers for a forward be plain ones of the whole shape, without their values.

    They are on their own device, or on the given one.

    For questions about shapes, dtypes and devices; nothing is sent. What is sharded over more dimensions than one stays
    sharded in a forward, by tensor parallelism.
    """
    sharded = [
        (module, name, p)
        for module in layer.modules()
        for name, p in module._parameters.items()
        if is_sharded(p) and sum(placement.is_shard() for placement in p.placements) == 1  # type: ignore[union-attr]
    ]
    stand_ins: dict[Tensor, nn.Parameter] = {}  # a shared Parameter has one
    for module, name, p in sharded:
        module._parameters[name] = stand_ins.setdefault(p, _stand_in(p, device))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module, name, p in sharded:
            module._parameters[name] = p


def _stand_in(p: Tensor, device: str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device or p.device), requires_grad=p.requires_grad)
