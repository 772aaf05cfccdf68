"""Tensors that are sharded over ranks, torch's DTensor, as FSDP2 makes them of Parameters: this rank's part of one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(t: object) -> bool:
    """Whether `t` is a DTensor; torch.distributed.tensor is not imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


@torch.no_grad()
def local(t: Any) -> Tensor:
    """This rank's part of a DTensor, in its memory; a plain tensor as it is."""
    if not is_sharded(t):
        return t
    part = t.to_local()
    return part.wait() if hasattr(part, "wait") else part  # what a collective has not delivered yet


@torch.no_grad()
def wrapped(part: Tensor, like: Any, shape: Sequence[int] | None = None, placements: Any = None) -> Tensor:
    """A DTensor of this rank's part, laid out as `like` is, or as shape and placements say."""
    from torch.distributed.tensor import DTensor

    shape = like.shape if shape is None else torch.Size(shape)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = like.placements if placements is None else placements
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def sharded_as(t: Any, like: Any, placements: Any = None) -> Tensor:
    """A DTensor laid out as `like`, or as placements say, of a DTensor of the same ranks or of the whole plain tensor.

    Raises:
        ValueError: if it is a DTensor of other ranks.
    """
    from torch.distributed.tensor import distribute_tensor

    placements = tuple(like.placements if placements is None else placements)
    if not is_sharded(t):  # every rank has it all: nothing is sent
        return distribute_tensor(t.to(local(like).device), like.device_mesh, placements, src_data_rank=None)
    if t.device_mesh != like.device_mesh:
        raise ValueError(f"expected a DTensor of the ranks {like.device_mesh}, got one of {t.device_mesh}")
    return t if tuple(t.placements) == placements else t.redistribute(placements=placements)


def view_as_dtype(t: Any, dtype: torch.dtype) -> Tensor:
    """`t.view(dtype)` for a dtype of the same size, of a DTensor too."""
    return wrapped(local(t).view(dtype), t) if is_sharded(t) else t.view(dtype)


def shard_number(t: Any) -> int:
    """Which of the different parts of a DTensor this rank has; ranks that hold copies of one have the same number."""
    number = 0
    for dim, (placement, place) in enumerate(zip(t.placements, t.device_mesh.get_coordinate(), strict=True)):
        if placement.is_shard():
            number = number * t.device_mesh.size(dim) + place
    return number


def largest_part(t: Any) -> tuple[int, ...]:
    """Shape of the largest part of a DTensor."""
    sizes = list(t.shape)
    for dim, placement in enumerate(t.placements):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // t.device_mesh.size(dim))
    return tuple(sizes)
