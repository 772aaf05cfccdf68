"""States as tensors on the parameters' devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from lora_ops.kernels.adamw import Slice, adamw_
from lora_ops.optim.layout import Segment, States, converted, new_states
from lora_ops.optim.plan import Plan
from lora_ops.optim.states import Sink, Source, StateShape

_FILL = 1 << 20  # elements that are loaded at a time, in whole blocks: what a file gives is in memory twice


class ResidentStates:
    """A `StateStore` in which each parameter is an extent of its own, with its number."""

    pager = None

    def __init__(self) -> None:
        self._states: dict[int, States] = {}

    def add(self, shapes: Sequence[StateShape]) -> None:
        for shape in shapes:
            self._states[shape.index] = new_states(shape.numel, shape.bits, shape.device)

    def slices(self, indices: Sequence[int]) -> dict[int, list[tuple[int, Segment]]]:
        found = {}
        for member, index in enumerate(indices):
            states = self._states[index]
            found[index] = [(member, Segment(index, 0, 0, states.exp_avg.numel(), states.bits))]
        return found

    def step(self, plan: Plan) -> None:
        """Update every parameter, in one kernel call a device."""
        if table := plan.table(self._addresses):
            table.run(plan.values)
            return
        slices: dict[torch.device, list[Slice]] = defaultdict(list)
        for index, [(member, segment)] in plan.slices.items():
            s = plan.slice(member, segment, self._states[index])
            slices[s.param.device].append(s)
        for of_device in slices.values():
            adamw_(of_device, plan.values.rows, seed=plan.values.seed)

    def fill(self, source: Source) -> None:
        for index, states in self._states.items():
            numel = states.exp_avg.numel()
            for first in range(0, numel, _FILL):
                n = min(_FILL, numel - first)
                if (found := source.states(index, first, n)) is not None:
                    states.slice(first, n).copy_(converted(found, states.bits))

    def drain(self, sink: Sink) -> None:
        for index, states in self._states.items():
            sink.write(index, 0, states)

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        for index, states in self._states.items():
            yield index, 0, states.exp_avg.numel(), states.bits

    def rename(self, numbers: Mapping[int, int | None]) -> None:
        self._states = {new: self._states[old] for old, new in numbers.items() if new is not None}

    def reset(self) -> None:
        self._states = {}

    def close(self) -> None:
        self.reset()

    def _addresses(self, segment: Segment) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in self._states[segment.extent].tensors().values())
