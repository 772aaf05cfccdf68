"""States in extents behind a pager, under a byte budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from lora_ops.kernels.adamw import SliceTable, adamw_
from lora_ops.optim.layout import Packer, Segment, States, converted, new_states, places, views
from lora_ops.optim.plan import Plan
from lora_ops.optim.states import Sink, Source, StateShape
from lora_ops.paging.pager import Pager
from lora_ops.paging.tiers import FileTier


class PagedStates:
    """A `StateStore` in extents.

    Args:
        pager: holds the extents.
    """

    def __init__(self, pager: Pager) -> None:
        self.pager = pager
        self._segments: dict[int, list[Segment]] = {}
        self._bits: dict[int, int] = {}
        self._packer = Packer(pager.tier.extent_bytes)
        self._views: dict[tuple[int, int], tuple[Tensor, States]] = {}
        # Room of forgotten parameters, by size and bits.
        self._spare: dict[tuple[int, int], list[list[Segment]]] = defaultdict(list)

    def add(self, shapes: Sequence[StateShape]) -> None:
        """Place new parameters in extents, which begin as zeros.

        Raises:
            PagingError: if the slow tier has no room; nothing is changed then.
        """
        packer = copy(self._packer)  # ours is untouched if there is no room: the step may be tried again
        spare = {size: list(rooms) for size, rooms in self._spare.items()}
        placed: dict[int, list[Segment]] = {}
        used: list[Segment] = []
        for shape in shapes:
            if rooms := spare.get((shape.numel, shape.bits)):
                placed[shape.index] = rooms.pop()
                used += placed[shape.index]
            else:
                placed[shape.index] = packer.place(shape.numel, shape.bits)
        missing = packer.n_extents - len(self.pager.table)
        if missing > 0:
            self.pager.allocate(missing)
        self._zero(used)
        self._packer = packer
        self._spare = defaultdict(list, spare)
        self._segments.update(placed)
        self._bits.update((shape.index, shape.bits) for shape in shapes)

    def slices(self, indices: Sequence[int]) -> dict[int, list[tuple[int, Segment]]]:
        return _by_extent((member, self._segments[index]) for member, index in enumerate(indices))

    def step(self, plan: Plan) -> None:
        """Update every parameter: native code moves pages of a file by itself, others are swept by the pager."""
        table = plan.table(_offsets) if isinstance(self.pager.tier, FileTier) else None
        if table is None:
            self._sweep(plan)
        else:
            self._stream(plan, table)

    def _sweep(self, plan: Plan) -> None:
        """One kernel call for each batch of extents that the pager brings."""
        for batch in self.pager.sweep(plan.extents):
            slices = [
                plan.slice(member, segment, self._states(segment, frame))
                for extent, frame in batch
                for member, segment in plan.slices[extent]
            ]
            adamw_(slices, plan.values.rows, seed=plan.values.seed)

    def _stream(self, plan: Plan, table: SliceTable) -> None:
        """One call of native code, which brings the extents as well; where all are in frames, of the kernel alone."""
        if (addresses := self.pager.touch(plan.extents)) is not None:
            table.place(addresses, plan.counts)
            table.run(plan.values)
            return
        table.place([0] * len(plan.extents), plan.counts)
        with self.pager.native_pass(plan.extents, plan.bounds) as work:
            work.report = table.run_in_pages(work.pages, plan.values)

    def fill(self, source: Source) -> None:
        """Load the states of every parameter, extent by extent."""
        parts = _by_extent(self._segments.items())
        for batch in self.pager.sweep(list(parts), read=False):
            for extent, frame in batch:
                for index, s in parts[extent]:
                    found = source.states(index, s.first, s.n)
                    if found is None:
                        found = new_states(s.n, s.bits, frame.device)
                    self._states(s, frame).copy_(converted(found, s.bits))

    def drain(self, sink: Sink) -> None:
        """Save the states of every parameter, extent by extent."""
        parts = _by_extent(self._segments.items())
        for batch in self.pager.sweep(list(parts), write=False):
            for extent, frame in batch:
                for index, s in parts[extent]:
                    sink.write(index, s.first, self._states(s, frame))
        for index, segments in self._segments.items():
            if not segments:  # a parameter without elements has a state all the same
                sink.write(index, 0, new_states(0, self._bits[index], torch.device("cpu")))

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        for index, segments in self._segments.items():
            for s in segments:
                yield index, s.first, s.n, s.bits
            if not segments:
                yield index, 0, 0, self._bits[index]

    def rename(self, numbers: Mapping[int, int | None]) -> None:
        """Give every parameter another number; those with None are forgotten, and their room serves for others."""
        before, self._segments = self._segments, {}
        self._bits = {new: self._bits[old] for old, new in numbers.items() if new is not None}
        for old, new in numbers.items():
            segments = before[old]
            if new is not None:
                self._segments[new] = segments
            elif segments:
                self._spare[sum(s.n for s in segments), segments[0].bits].append(segments)

    def reset(self) -> None:
        """Forget every parameter; frames and file are kept."""
        self.pager.reset()
        self._segments = {}
        self._bits = {}
        self._packer = Packer(self.pager.tier.extent_bytes)
        self._views = {}
        self._spare = defaultdict(list)

    def close(self) -> None:
        self._segments = {}
        self._views = {}
        self.pager.close()

    def _zero(self, segments: list[Segment]) -> None:
        parts = _by_extent([(0, segments)])
        for batch in self.pager.sweep(list(parts)):
            for extent, frame in batch:
                for _, s in parts[extent]:
                    for t in self._states(s, frame).tensors().values():
                        t.zero_()

    def _states(self, s: Segment, frame: Tensor) -> States:
        place = s.extent, s.offset
        cached = self._views.get(place)  # of a resident extent the frame stays the same
        if cached is None or cached[0] is not frame:
            cached = self._views[place] = frame, views(frame, s.offset, s.n, s.bits)
        return cached[1]


def _by_extent(segments: Iterable[tuple[int, list[Segment]]]) -> dict[int, list[tuple[int, Segment]]]:
    """The segments of some parameters, each with its parameter's number, by the extent that they are in."""
    parts: dict[int, list[tuple[int, Segment]]] = defaultdict(list)
    for number, of_one in segments:
        for segment in of_one:
            parts[segment.extent].append((number, segment))
    return dict(parts)


def _offsets(s: Segment) -> tuple[int, ...]:
    """Where the states of a segment are in its extent."""
    return places(s.offset, s.n, s.bits)
