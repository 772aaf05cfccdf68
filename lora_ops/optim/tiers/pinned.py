"""Frames on a device over pinned host memory, moved by two side streams; behind that, if asked for, a file.

A frame, and an extent's place in pinned memory, each remember the last work that was enqueued on them. Whatever is
enqueued next waits for that, on its own stream: a write-back for the kernel that changed the frame, a read for the
write-back of the frame and of the extent, a kernel for the read. The host waits for none of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ops.optim.errors import PagingError
from lora_ops.optim.tiers.base import TierStats, Transfer
from lora_ops.optim.tiers.cuda import Device, Event


@dataclass(slots=True, eq=False)
class Place:
    """Memory of one extent, and the last work that was enqueued on it."""

    memory: Tensor
    last: Event | None = None


class PinnedTier:
    """Extents in pinned host memory.

    Args:
        device: where the frames are.
        extent_bytes: size of an extent.
    """

    def __init__(self, device: Device, extent_bytes: int) -> None:
        self.device = device
        self.fast = device.name
        self.extent_bytes = extent_bytes
        self.stats = TierStats()
        self._owner = os.getpid()
        self._closed = False
        self._reads, self._writes = device.new_stream(), device.new_stream()
        self._frames: dict[int, Place] = {}
        self._homes: list[Place] = []
        self._slabs: list[Tensor] = []

    @property
    def directory(self) -> Path | None:
        """None: there are no files."""
        return None

    def new_frame(self) -> Tensor:
        """A frame, zeroed on the current stream."""
        frame = self.device.new_frame(self.extent_bytes)
        self._frames[frame.data_ptr()] = Place(frame, self.device.record(self.device.current_stream()))
        return frame

    def reserve(self, n_extents: int) -> None:
        """Pin memory, so that a lack of it is an error here and not in the middle of a step."""
        missing = n_extents - len(self._homes)
        if missing > 0:
            slab = self.device.pin(missing * self.extent_bytes)
            self._slabs.append(slab)
            self._homes += [Place(memory) for memory in slab.split(self.extent_bytes)]

    def read(self, extent: int, frame: Tensor) -> Transfer:
        """Enqueue a copy to the device."""
        self._check_open()
        place = self._frames[frame.data_ptr()]
        self._copy(self._reads, place, self._homes[extent])
        self.stats.bytes_read += self.extent_bytes
        return _Enqueued(place.last)

    def write(self, extent: int, frame: Tensor) -> Transfer:
        """Enqueue a copy to pinned memory."""
        self._check_open()
        home = self._homes[extent]
        self._copy(self._writes, home, self._frames[frame.data_ptr()])
        self.stats.bytes_written += self.extent_bytes
        return _Enqueued(home.last)

    def clear(self, frame: Tensor) -> Transfer:
        """Enqueue zeroing a frame."""
        self._check_open()
        place = self._frames[frame.data_ptr()]
        self._wait(self._reads, place)
        self.device.zero(self._reads, place.memory)
        self._note(self._reads, place)
        return _Enqueued(place.last)

    def acquire(self, frames: Sequence[Tensor]) -> None:
        """Let the current stream wait for what the side streams do with the frames."""
        self._wait(self.device.current_stream(), *self._places(frames))

    def release(self, frames: Sequence[Tensor]) -> None:
        """Note what the current stream does with the frames."""
        self._note(self.device.current_stream(), *self._places(frames))

    def bytes_by_tier(self) -> dict[str, int]:
        """What is pinned."""
        return {"pinned": sum(slab.nbytes for slab in self._slabs)}

    def close(self) -> None:
        """Wait for all that was enqueued on frames and pinned memory, and give both back."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        try:
            for place in (*self._frames.values(), *self._homes):
                if place.last is not None:
                    place.last.synchronize()
        finally:
            self._frames, self._homes = {}, []
            while self._slabs:
                self.device.unpin(self._slabs.pop())

    def _places(self, frames: Sequence[Tensor]) -> list[Place]:
        return [] if self._closed else [self._frames[frame.data_ptr()] for frame in frames]

    def _copy(self, stream: Any, target: Place, source: Place) -> None:
        self._wait(stream, target, source)
        self.device.copy(stream, target.memory, source.memory)
        self._note(stream, target, source)

    def _wait(self, stream: Any, *places: Place) -> None:
        """Let a stream wait for the last work on some places."""
        for event in dict.fromkeys(place.last for place in places):
            if event is not None:
                self.device.wait(stream, event)

    def _note(self, stream: Any, *places: Place) -> None:
        """Note what a stream was given last as the last work on some places."""
        event = self.device.record(stream)
        for place in places:
            place.last = event

    def _check_open(self) -> None:
        if self._closed:
            raise PagingError("pinned memory: the optimizer that owned these pages was closed")


@dataclass(frozen=True, slots=True)
class _Enqueued:
    """A transfer that a stream will carry out; nothing can go wrong with it that its caller would see here."""

    event: Event | None

    def done(self) -> bool:
        return self.event is None or self.event.query()

    def result(self) -> None:
        return None
