"""Optimizer memory before there is an optimizer, by tier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from lora_ops.optim.layout import Packer, effective_bits, state_bytes
from lora_ops.paging.budget import MAX_EXTENT, check_extents, choose_extent_bytes, parse_bytes
from lora_ops.runtime.sharding import local


def _numel(p: Tensor | int, bits: int) -> tuple[int, int]:
    """Elements that have their states here, and the bits of these."""
    if isinstance(p, Tensor):
        return local(p).numel(), effective_bits(p.numel(), bits)
    if not isinstance(p, Integral) or p < 0:
        raise ValueError(f"params: expected tensors or numbers of elements, got {p!r}")
    return int(p), effective_bits(int(p), bits)


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that AdamW's states need: `states` altogether, `fast` in the fast tier at most, `slow` behind it."""

    states: int
    fast: int
    slow: int
    extent_bytes: int
    extents: int

    def __str__(self) -> str:
        paged = f", {self.slow / 2**20:.1f} MiB of them behind it" if self.slow else ""
        return f"states {self.states / 2**20:.1f} MiB: {self.fast / 2**20:.1f} MiB in the fast tier{paged}"


def optimizer_memory(
    params: Iterable[Tensor | int],
    *,
    state_bits: int = 32,
    page_budget: int | str | None = None,
    extent_bytes: int | None = None,
    device: str | torch.device = "cpu",
) -> OptimizerMemory:
    """What AdamW's states will need, with and without paging; nothing is allocated.

    Args:
        params: the trained parameters, or their numbers of elements. Of a sharded one (DTensor) this rank's part
            counts.
        state_bits: 32 or 8; tensors under 4096 elements count with 32.
        page_budget, extent_bytes: as for `AdamW`.
        device: "cpu" or "cuda", where the parameters will be: how large extents are by themselves goes by it.

    Returns:
        The memory by tier. With a budget, whole extents count, and `slow` is the size of the page file, or on CUDA
        that of pinned memory (with a host_budget that of the file, and pinned memory comes on top).

    Raises:
        TypeError, ValueError: if an argument is out of range.
    """
    if state_bits not in (8, 32):
        raise ValueError(f"state_bits: expected 32 or 8, got {state_bits!r}")
    kind = torch.device(device).type
    if kind not in MAX_EXTENT:
        raise ValueError(f"device: expected one of {', '.join(MAX_EXTENT)}, got {str(device)!r}")
    if isinstance(params, Tensor):
        raise TypeError("params: expected several tensors or numbers of elements, got one tensor")
    numels = [_numel(p, state_bits) for p in params]
    if page_budget is None:
        states = sum(state_bytes(n, bits) for n, bits in numels)
        return OptimizerMemory(states, states, 0, 0, 0)
    budget = parse_bytes("page_budget", page_budget)
    extent = choose_extent_bytes(budget, kind) if extent_bytes is None else extent_bytes
    check_extents(budget, extent)
    packer = Packer(extent)
    for n, bits in numels:
        packer.place(n, bits)
    frames = budget // extent
    fast = min(frames, packer.n_extents) * extent
    slow = packer.n_extents * extent if packer.n_extents > frames else 0
    return OptimizerMemory(packer.n_extents * extent, fast, slow, extent, packer.n_extents)
