"""What an optimizer asks of the place where its states are: resident.py has them in tensors, paged.py in pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lora_ops.optim.layout import Segment, States
from lora_ops.optim.plan import Plan
from lora_ops.paging.pager import Pager


@dataclass(frozen=True, slots=True)
class StateShape:
    """What the states of a parameter need: its number among all, elements, bits, and device."""

    index: int
    numel: int
    bits: int
    device: torch.device


class Source(Protocol):
    """Where states are loaded from."""

    def states(self, index: int, first: int, n: int) -> States | None:
        """States of elements [first, first + n) of a parameter, or None if it has none."""


class Sink(Protocol):
    """Where states are saved to."""

    def write(self, index: int, first: int, states: States) -> None:
        """Take the states of a run of elements of a parameter that begins at `first`."""


class StateStore(Protocol):
    """States of parameters, by their numbers, and the step that updates them: the same bits wherever they are.

    Attributes:
        pager: holds the pages, if they are in pages.
    """

    @property
    def pager(self) -> Pager | None: ...

    def add(self, shapes: Sequence[StateShape]) -> None:
        """Make zero states for new parameters; raises PagingError, and changes nothing, if there is no room."""

    def slices(self, indices: Sequence[int]) -> dict[int, list[tuple[int, Segment]]]:
        """By extent, the (place in `indices`, segment) of all elements of some parameters: what a plan lays out."""

    def step(self, plan: Plan) -> None:
        """Update every parameter of a plan that has the slices of this store."""

    def fill(self, source: Source) -> None:
        """Load the states of every parameter."""

    def drain(self, sink: Sink) -> None:
        """Save the states of every parameter."""

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(index, first, n, bits) of every call that `drain` makes."""

    def rename(self, numbers: Mapping[int, int | None]) -> None:
        """Give every parameter another number; those with None are forgotten."""

    def reset(self) -> None:
        """Forget every parameter."""

    def close(self) -> None:
        """Give back memory and files."""
