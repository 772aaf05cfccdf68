"""The states of a sharded parameter (DTensor, as under FSDP2): each rank has those of its part, and a state dict all.

exp_avg and exp_avg_sq are sharded as their parameter. The blocks of 8-bit states begin anew in each part. Where they
are those of the whole parameter, because parts begin at whole blocks, their absmax stands as for a plain parameter,
sharded alike; else it has a row for each part, as long as the largest one needs: [parts, blocks].
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lora_ops.optim.layout import BLOCK_SIZE, part_numel
from lora_ops.runtime.sharding import is_sharded, largest_part, local, sharded_as, wrapped


def state_shape(name: str, p: Any) -> tuple[int, ...]:
    """Shape of the tensor `name` in the state dict."""
    if not name.endswith("absmax"):
        return tuple(p.shape)
    return _absmax_layout(p)[0] if is_sharded(p) else (part_numel(name, p.numel()),)


def shaped(name: str, part: Tensor, p: Any) -> Tensor:
    """A state of this rank's part of `p`, flat, as it stands in the state dict."""
    if not is_sharded(p):
        return part if name.endswith("absmax") else part.view(p.shape)
    if not name.endswith("absmax"):
        return wrapped(part.view(local(p).shape), p)
    shape, placements = _absmax_layout(p)
    if len(shape) > 1:
        row = part.new_zeros((1,) * (len(shape) - 1) + shape[-1:])
        row.view(-1)[: part.numel()] = part
        part = row
    return wrapped(part, p, shape, placements)


def own_part(name: str, saved: Tensor, p: Any) -> Tensor:
    """This rank's part of a state from a state dict, of the shape `state_shape`, flat.

    Raises:
        ValueError: if it is sharded and the parameter is not, or over other ranks.
    """
    if not is_sharded(p):
        if is_sharded(saved):
            raise ValueError(
                "expected a plain tensor for a parameter that is not sharded, got a DTensor: take the state dict with "
                "StateDictOptions(full_state_dict=True)"
            )
        return saved.detach().reshape(-1)
    placements = _absmax_layout(p)[1] if name.endswith("absmax") else None
    part = local(sharded_as(saved.detach(), p, placements)).reshape(-1)
    return part[: part_numel(name, local(p).numel())]


def _absmax_layout(p: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Shape and placements of the absmax of a sharded parameter."""
    from torch.distributed.tensor import Shard

    sharding = [dim for dim, placement in enumerate(p.placements) if placement.is_shard()]
    most = math.prod(largest_part(p))
    whole = -(-p.numel() // BLOCK_SIZE)
    if not sharding:
        return (whole,), tuple(p.placements)
    if len(sharding) == 1 and p.placements[sharding[0]] == Shard(0) and most % BLOCK_SIZE == 0:
        parts = p.device_mesh.size(sharding[0])
        if most // BLOCK_SIZE == -(-whole // parts):
            return (whole,), tuple(p.placements)
    rows = tuple(p.device_mesh.size(dim) for dim in sharding)
    numbers = iter(range(len(rows)))
    placements = tuple(Shard(next(numbers)) if placement.is_shard() else placement for placement in p.placements)
    return (*rows, -(-most // BLOCK_SIZE)), placements
