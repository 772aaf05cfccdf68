"""How the states of n elements lie in bytes, and how parameters are cut into extents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lora_ops.kernels.adamw import BLOCK_SIZE
from lora_ops.quant.blockwise8 import dequantize_blockwise8, quantize_blockwise8

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
MIN_8BIT_NUMEL = 4096  # smaller tensors keep 32-bit states, as in bitsandbytes


def effective_bits(numel: int, state_bits: int) -> int:
    """Bits of the states of a tensor: those asked for, and 32 for small tensors."""
    return 32 if numel < MIN_8BIT_NUMEL else state_bits


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _parts(n: int, bits: int) -> tuple[int, ...]:
    """Aligned bytes of exp_avg, exp_avg_sq and, with codes, of the absmax of each."""
    if bits == 32:
        return _aligned(4 * n), _aligned(4 * n)
    absmax = _aligned(4 * -(-n // BLOCK_SIZE))
    return _aligned(n), _aligned(n), absmax, absmax


def state_bytes(n: int, bits: int) -> int:
    """Bytes that the states of n elements take in an extent."""
    return sum(_parts(n, bits))


def capacity(room: int, bits: int) -> int:
    """The most elements, in whole blocks, whose states fit in `room` bytes."""
    per_block = 8 * BLOCK_SIZE if bits == 32 else 2 * BLOCK_SIZE + 8
    blocks = max(0, room // per_block)
    while blocks and state_bytes(blocks * BLOCK_SIZE, bits) > room:
        blocks -= 1
    return blocks * BLOCK_SIZE


@dataclass(frozen=True)
class States:
    """The states of a run of elements: exp_avg and exp_avg_sq are float32, or uint8 codes with their absmax."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    @staticmethod
    def names(bits: int) -> tuple[str, ...]:
        """Names of the tensors that are present."""
        return ("exp_avg", "exp_avg_sq") + (("exp_avg_absmax", "exp_avg_sq_absmax") if bits == 8 else ())

    def slice(self, first: int, n: int) -> States:
        """The states of elements [first, first + n); first is a multiple of the block size."""
        blocks = slice(first // BLOCK_SIZE, -(-(first + n) // BLOCK_SIZE))
        elements = slice(first, first + n)
        return States(*(t[blocks if name.endswith("absmax") else elements] for name, t in self.tensors().items()))

    def copy_(self, other: States) -> None:
        """Take over the values of states of the same bits and size."""
        for mine, its in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine.copy_(its)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        return {name: t for name in self.names(8) if (t := getattr(self, name)) is not None}

    @property
    def bits(self) -> int:
        return 32 if self.exp_avg_absmax is None else 8


def part_numel(name: str, n: int) -> int:
    """Elements of the tensor `name` in the states of n elements."""
    return -(-n // BLOCK_SIZE) if name.endswith("absmax") else n


def part_dtype(name: str, bits: int) -> torch.dtype:
    """The dtype of the tensor `name`."""
    return torch.float32 if bits == 32 or name.endswith("absmax") else torch.uint8


def places(offset: int, n: int, bits: int) -> tuple[int, ...]:
    """Where the states of n elements that begin at `offset` have each of their tensors."""
    return tuple(accumulate(_parts(n, bits)[:-1], initial=offset))


def views(buffer: Tensor, offset: int, n: int, bits: int) -> States:
    """The states of n elements that lie at `offset` of a uint8 buffer."""
    found = []
    for name, begin in zip(States.names(bits), places(offset, n, bits), strict=True):
        dtype = part_dtype(name, bits)
        found.append(buffer[begin : begin + part_numel(name, n) * dtype.itemsize].view(dtype))
    return States(*found)


def new_states(n: int, bits: int, device: torch.device) -> States:
    """States of n elements outside any extent, all zero."""
    return States(
        *(torch.zeros(part_numel(name, n), dtype=part_dtype(name, bits), device=device) for name in States.names(bits))
    )


def converted(states: States, bits: int) -> States:
    """The same states in another number of bits; those that fit are returned as they are."""
    if states.bits == bits:
        return states
    if bits == 8:
        if not (states.exp_avg.isfinite().all() and states.exp_avg_sq.isfinite().all()):
            raise ValueError("states: expected finite values to code in 8 bits, got inf or NaN")
        m, m_absmax = quantize_blockwise8(states.exp_avg, block_size=BLOCK_SIZE, signed=True)
        v, v_absmax = quantize_blockwise8(states.exp_avg_sq, block_size=BLOCK_SIZE, signed=False)
        return States(m, v, m_absmax, v_absmax)
    if states.exp_avg_absmax is None or states.exp_avg_sq_absmax is None:
        raise ValueError("states: expected an absmax with 8-bit codes")
    return States(
        dequantize_blockwise8(states.exp_avg, states.exp_avg_absmax, block_size=BLOCK_SIZE, signed=True),
        dequantize_blockwise8(states.exp_avg_sq, states.exp_avg_sq_absmax, block_size=BLOCK_SIZE, signed=False),
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [first, first + n) of a parameter, whose states lie at `offset` of an extent."""

    extent: int
    offset: int
    first: int
    n: int
    bits: int


class Packer:
    """Cuts parameters into segments, one extent after the other.

    Args:
        extent_bytes: size of an extent; holds at least one block.
    """

    def __init__(self, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self.n_extents = 0
        self._used = extent_bytes  # of the last extent

    def place(self, numel: int, bits: int) -> list[Segment]:
        """Segments of a parameter; `n_extents` grows as needed."""
        segments: list[Segment] = []
        first = 0
        while first < numel:
            left, room = numel - first, self.extent_bytes - self._used
            n = left if state_bytes(left, bits) <= room else capacity(room, bits)
            if n == 0:
                self.n_extents += 1
                self._used = 0
                continue
            segments.append(Segment(self.n_extents - 1, self._used, first, n, bits))
            self._used += state_bytes(n, bits)
            first += n
        return segments
