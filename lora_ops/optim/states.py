"""Where an optimizer keeps its states: in tensors, or in pages. Both run the same kernel on the same slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from lora_ops.kernels.adamw import Again, Slice, Table, adamw_
from lora_ops.optim.layout import Packer, Segment, States, converted, new_states, views
from lora_ops.optim.pages import Pager
from lora_ops.optim.tiers import FileTier

_FILL = 1 << 20  # elements that are loaded at a time, in whole blocks: what a file gives is in memory twice


@dataclass(frozen=True, slots=True)
class Spec:
    """What a parameter needs: its number among all parameters, elements, bits of its states, and device."""

    index: int
    numel: int
    bits: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Job:
    """One parameter's part of a step: flat contiguous param and grad, row of the constants, the step's number, and
    the stream of random bits."""

    index: int
    param: Tensor
    grad: Tensor
    row: int
    step: int
    stream: int


class Source(Protocol):
    """Where states are loaded from."""

    def states(self, index: int, first: int, n: int) -> States | None:
        """States of elements [first, first + n) of a parameter, or None if it has none."""


class Sink(Protocol):
    """Where states are saved to."""

    def write(self, index: int, first: int, states: States) -> None:
        """Take the states of a run of elements of a parameter that begins at `first`."""


class ResidentStates:
    """States as tensors on the parameters' devices."""

    def __init__(self) -> None:
        self.states: dict[int, States] = {}

    def add(self, specs: Sequence[Spec]) -> None:
        """Make zero states for new parameters."""
        for spec in specs:
            self.states[spec.index] = new_states(spec.numel, spec.bits, spec.device)

    def step(self, jobs: Sequence[Job], rows: Sequence[tuple[float, ...]], seed: int | None) -> None:
        """Update every parameter, in one kernel call a device."""
        slices: dict[torch.device, list[Slice]] = defaultdict(list)
        for job in jobs:
            slices[job.param.device].append(_slice(job, job.param, job.grad, self.states[job.index], 0))
        for group in slices.values():
            adamw_(group, rows, seed=seed)

    def lay_out(self, jobs: Sequence[Job]) -> Callable[[Again], None]:
        """The same step again; for parameters on the CPU, until states are added or loaded."""
        slices = [_slice(job, job.param, job.grad, self.states[job.index], 0) for job in jobs]
        table = Table(slices, range(len(jobs)))
        return lambda again: Table.run([table], again)

    def fill(self, source: Source) -> None:
        """Load the states of every parameter."""
        for index, states in self.states.items():
            numel = states.exp_avg.numel()
            for first in range(0, numel, _FILL):
                n = min(_FILL, numel - first)
                if (found := source.states(index, first, n)) is not None:
                    states.slice(first, n).copy_(converted(found, states.bits))

    def drain(self, sink: Sink) -> None:
        """Save the states of every parameter."""
        for index, states in self.states.items():
            sink.write(index, 0, states)

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(index, first, n, bits) of every call that `drain` makes."""
        for index, states in self.states.items():
            yield index, 0, states.exp_avg.numel(), states.bits

    def rename(self, numbers: Mapping[int, int | None]) -> None:
        """Give every parameter another number; those with None are forgotten."""
        self.states = {new: self.states[old] for old, new in numbers.items() if new is not None}

    def reset(self) -> None:
        """Forget every parameter."""
        self.states = {}

    def close(self) -> None:
        """Free the tensors."""
        self.reset()

    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(t.nbytes for states in self.states.values() for t in states.tensors().values())


class PagedStates:
    """States in extents behind a pager.

    Args:
        pager: holds the extents.
        extent_bytes: their size.
    """

    def __init__(self, pager: Pager, extent_bytes: int) -> None:
        self.pager = pager
        self.extent_bytes = extent_bytes
        self.segments: dict[int, list[Segment]] = {}
        self._bits: dict[int, int] = {}
        self._packer = Packer(extent_bytes)
        self._views: dict[tuple[int, int], tuple[Tensor, States]] = {}
        # Room of forgotten parameters, by size and bits.
        self._spare: dict[tuple[int, int], list[list[Segment]]] = defaultdict(list)

    def add(self, specs: Sequence[Spec]) -> None:
        """Place new parameters in extents, which begin as zeros.

        Raises:
            PagingError: if the slow tier has no room; nothing is changed then.
        """
        packer = copy(self._packer)  # ours is untouched if there is no room: the step may be tried again
        spare = {size: list(rooms) for size, rooms in self._spare.items()}
        placed: dict[int, list[Segment]] = {}
        used: list[Segment] = []
        for spec in specs:
            if rooms := spare.get((spec.numel, spec.bits)):
                placed[spec.index] = rooms.pop()
                used += placed[spec.index]
            else:
                placed[spec.index] = packer.place(spec.numel, spec.bits)
        missing = packer.n_extents - len(self.pager.table)
        if missing > 0:
            self.pager.allocate(missing)
        self._zero(used)
        self._packer = packer
        self._spare = defaultdict(list, spare)
        self.segments.update(placed)
        self._bits.update((spec.index, spec.bits) for spec in specs)

    def _zero(self, segments: Sequence[Segment]) -> None:
        parts: dict[int, list[Segment]] = defaultdict(list)
        for s in segments:
            parts[s.extent].append(s)
        for batch in self.pager.sweep(list(parts)):
            for extent, frame in batch:
                for s in parts[extent]:
                    for t in views(frame, s.offset, s.n, s.bits).tensors().values():
                        t.zero_()

    def step(self, jobs: Sequence[Job], rows: Sequence[tuple[float, ...]], seed: int | None) -> None:
        """Update every parameter, in one kernel call for each batch of extents that the pager brings."""
        parts: dict[int, list[tuple[Job, Segment]]] = defaultdict(list)
        for job in jobs:
            for segment in self.segments[job.index]:
                parts[segment.extent].append((job, segment))
        for batch in self.pager.sweep(list(parts)):
            slices = []
            for extent, frame in batch:
                slices += [_part(job, s, self._states(job.index, s, frame)) for job, s in parts[extent]]
            adamw_(slices, rows, seed=seed)

    def lay_out(self, jobs: Sequence[Job]) -> Callable[[Again], None]:
        """The same step again; for parameters on the CPU, until states are added or loaded."""
        parts: dict[int, list[tuple[int, Segment]]] = defaultdict(list)
        for number, job in enumerate(jobs):
            for segment in self.segments[job.index]:
                parts[segment.extent].append((number, segment))
        anywhere = torch.empty(self.extent_bytes, dtype=torch.uint8)  # never touched: it only gives addresses
        tables = {}
        for extent, members in parts.items():
            slices = [_part(jobs[i], s, views(anywhere, s.offset, s.n, s.bits)) for i, s in members]
            tables[extent] = Table(slices, [i for i, _ in members], anywhere.data_ptr())
        extents = tuple(tables)

        def swept(again: Again) -> None:
            for batch in self.pager.sweep(extents):
                Table.run([tables[extent].move(frame.data_ptr()) for extent, frame in batch], again)

        tier = self.pager.tier
        if not isinstance(tier, FileTier):
            return swept
        whole, here = (Table.joined(list(tables.values())) for _ in range(2))
        counts = list(map(len, tables.values()))
        last: list[int] = []
        ends = list(accumulate(counts))
        bounds = {e: (end - len(table), end) for (e, table), end in zip(tables.items(), ends, strict=True)}

        def step(again: Again) -> None:
            nonlocal last
            if (addresses := self.pager.touch(extents)) is not None:
                if addresses != last:
                    here.place(addresses, counts)
                    last = addresses
                Table.run([here], again)
                return
            self.pager.stream(
                extents, bounds, lambda passage: tier.stream(passage, lambda pages: whole.run_in_pages(pages, again))
            )

        return step

    def fill(self, source: Source) -> None:
        """Load the states of every parameter, extent by extent."""
        parts = self._by_extent()
        for batch in self.pager.sweep(list(parts), read=False):
            for extent, frame in batch:
                for index, s in parts[extent]:
                    states = self._states(index, s, frame)
                    found = source.states(index, s.first, s.n)
                    if found is None:
                        found = new_states(s.n, s.bits, frame.device)
                    states.copy_(converted(found, s.bits))

    def drain(self, sink: Sink) -> None:
        """Save the states of every parameter, extent by extent."""
        parts = self._by_extent()
        for batch in self.pager.sweep(list(parts), write=False):
            for extent, frame in batch:
                for index, s in parts[extent]:
                    sink.write(index, s.first, self._states(index, s, frame))
        for index, segments in self.segments.items():
            if not segments:  # a parameter without elements has a state all the same
                sink.write(index, 0, new_states(0, self._bits[index], torch.device("cpu")))

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(index, first, n, bits) of every call that `drain` makes."""
        for index, segments in self.segments.items():
            for s in segments:
                yield index, s.first, s.n, s.bits
            if not segments:
                yield index, 0, 0, self._bits[index]

    def rename(self, numbers: Mapping[int, int | None]) -> None:
        """Give every parameter another number; those with None are forgotten, and their room serves for others."""
        before, self.segments, self._views = self.segments, {}, {}
        self._bits = {new: self._bits[old] for old, new in numbers.items() if new is not None}
        for old, new in numbers.items():
            segments = before[old]
            if new is not None:
                self.segments[new] = segments
            elif segments:
                self._spare[sum(s.n for s in segments), segments[0].bits].append(segments)

    def reset(self) -> None:
        """Forget every parameter; frames and file are kept."""
        self.pager.reset()
        self.segments = {}
        self._bits = {}
        self._packer = Packer(self.extent_bytes)
        self._views = {}
        self._spare = defaultdict(list)

    def close(self) -> None:
        """Give back memory and files."""
        self.segments = {}
        self._views = {}
        self.pager.close()

    def nbytes(self) -> int:
        """Bytes of all extents."""
        return len(self.pager.table) * self.extent_bytes

    def _by_extent(self) -> dict[int, list[tuple[int, Segment]]]:
        parts: dict[int, list[tuple[int, Segment]]] = defaultdict(list)
        for index, segments in self.segments.items():
            for segment in segments:
                parts[segment.extent].append((index, segment))
        return parts

    def _states(self, index: int, s: Segment, frame: Tensor) -> States:
        key = index, s.first
        cached = self._views.get(key)  # of a resident extent the frame stays the same
        if cached is None or cached[0] is not frame:
            cached = self._views[key] = frame, views(frame, s.offset, s.n, s.bits)
        return cached[1]


def _part(job: Job, s: Segment, states: States) -> Slice:
    """A segment of a parameter; most are whole ones, of which no views are needed."""
    if s.n == job.param.numel():
        return _slice(job, job.param, job.grad, states, 0)
    elements = slice(s.first, s.first + s.n)
    return _slice(job, job.param[elements], job.grad[elements], states, s.first)


def _slice(job: Job, param: Tensor, grad: Tensor, s: States, first: int) -> Slice:
    return Slice(
        param, grad, s.exp_avg, s.exp_avg_sq, s.exp_avg_absmax, s.exp_avg_sq_absmax,
        job.row, job.stream, job.step, first,
    )  # fmt: skip
