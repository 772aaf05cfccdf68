"""Optimizer memory before there is an optimizer: sizes, budgets, and what a plan needs by tier."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from lora_ops.optim.layout import Packer, effective_bits, state_bytes
from lora_ops.runtime.sharding import local

MIN_EXTENT = 64 << 10
# From 2 MiB on a copy to a device has its full bandwidth. On the CPU an extent that stays in the second-level cache
# between its transfers and its update makes a step cheaper: 16.7 ms with 512 KiB, 20.6 with 4 MiB (2 cores of a Zen 4).
MAX_EXTENT = {"cpu": 512 << 10, "cuda": 16 << 20}
PAGE = 4096  # the file's and the kernel's unit
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}  # fmt: skip


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes from an integer or a string such as "2GiB" or "500 MB".

    Raises:
        ValueError: if it is neither or not positive.
    """
    wanted = f"{name}: expected bytes or a string such as '2GiB' or '500MB', got {value!r}"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(wanted)
        number = int(float(match[1]) * unit)
    elif isinstance(value, bytes):
        raise ValueError(wanted)
    else:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):  # NaN, inf, a list
            raise ValueError(wanted) from None
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number of bytes, got {value!r}")
    return number


def choose_extent_bytes(page_budget: int, device: str = "cpu") -> int:
    """An eighth of the budget, as a power of two from 64 KiB to 512 KiB on the CPU, to 16 MiB on CUDA."""
    size = MAX_EXTENT[device]
    while size > MIN_EXTENT and size > page_budget // 8:
        size //= 2
    return size


def check_extents(page_budget: int, extent_bytes: int) -> None:
    """Raise ValueError unless extents are whole pages and at least two of them fit the budget."""
    if not isinstance(extent_bytes, int) or extent_bytes < PAGE or extent_bytes % PAGE:
        raise ValueError(f"extent_bytes: expected a multiple of {PAGE}, got {extent_bytes!r}")
    if page_budget < 2 * extent_bytes:
        raise ValueError(
            f"page_budget: expected at least {2 * extent_bytes} bytes, two extents of {extent_bytes}, got {page_budget}"
        )


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
