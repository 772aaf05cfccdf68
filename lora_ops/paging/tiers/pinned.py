"""Frames on a device over pinned host memory, moved by two side streams; behind that, if asked for, a file.

A frame, and an extent's place in pinned memory, each remember the last work that was enqueued on them. Whatever is
enqueued next waits for that, on its own stream: a write-back for the kernel that changed the frame, a read for the
write-back of the frame and of the extent, a kernel for the read. The host waits for none of it.

With a file, extents get a home in pinned memory when they are first written back, as long as there is one. The others
pass through a few places on their way from and to the file, whose thread waits for the streams. The host waits for that
thread where a read is needed, or all places outbound are still full.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ops.paging.errors import PagingError
from lora_ops.paging.stats import TierStats
from lora_ops.paging.tiers.base import Transfer
from lora_ops.paging.tiers.cuda import Device, Event
from lora_ops.paging.tiers.file import FileTier

MAX_STAGING = 4  # places for each direction: what is read ahead of the device, and written behind it


@dataclass(slots=True, eq=False)
class Place:
    """Memory of one extent, the last work that was enqueued on it, and what the file's thread does with it."""

    memory: Tensor
    last: Event | None = None
    job: Future[Any] | None = None

    def finish(self) -> None:
        """Block this thread until the work is done."""
        if self.last is not None:
            self.last.synchronize()


class PinnedTier:
    """Extents in pinned host memory, and in a file where that is full.

    Args:
        device: where the frames are.
        extent_bytes: size of an extent.
        file: takes the extents that have no place in pinned memory; this tier closes it. None: all have.
        host_extents: with a file, the most extents that are pinned, places on the way included; at least 2.
    """

    def __init__(
        self, device: Device, extent_bytes: int, *, file: FileTier | None = None, host_extents: int = 0
    ) -> None:
        if file is not None and host_extents < 2:
            raise ValueError(f"host_extents: expected at least 2 with a file, got {host_extents}")
        self.device = device
        self.fast = device.name
        self.extent_bytes = extent_bytes
        self.file = file
        self._staging = max(1, min(MAX_STAGING, host_extents // 4))
        self._max_homes = host_extents - 2 * self._staging
        self._moved = TierStats()
        self._owner = os.getpid()
        self._closed = False
        self._reads, self._writes = device.new_stream(), device.new_stream()
        self._frames: dict[int, Place] = {}  # by address
        self._homes: dict[int, Place] = {}  # by extent
        self._spare: list[Place] = []
        self._inbound: deque[Place] = deque()
        self._outbound: deque[Place] = deque()
        self._slabs: list[Tensor] = []

    @property
    def directory(self) -> Path | None:
        """The folder of the page file, if there is one."""
        return None if self.file is None else self.file.directory

    @property
    def stats(self) -> TierStats:
        """What went to and from the device; seconds are the file's."""
        of_file = TierStats() if self.file is None else self.file.stats
        moved = self._moved
        return TierStats(moved.bytes_read, moved.bytes_written, of_file.read_seconds, of_file.write_seconds)

    def new_frame(self) -> Tensor:
        """A frame, zeroed on the current stream."""
        frame = self.device.new_frame(self.extent_bytes)
        self._frames[frame.data_ptr()] = Place(frame, self.device.record(self.device.current_stream()))
        return frame

    def reserve(self, n_extents: int) -> None:
        """Pin memory and allocate the file: a lack of either is an error here and not in the midst of a step."""
        homes = n_extents if self.file is None else max(0, min(n_extents, self._max_homes))
        if self.file is not None and n_extents > homes:
            self.file.reserve(n_extents)
            if not self._inbound:
                self._inbound += self._pinned(self._staging)
                self._outbound += self._pinned(self._staging)
        self._spare += self._pinned(homes - len(self._homes) - len(self._spare))

    def read(self, extent: int, frame: Tensor) -> Transfer:
        """Enqueue a copy to the device, now or when the file's thread has read the extent."""
        self._check_open()
        place = self._frames[frame.data_ptr()]
        self._moved.bytes_read += self.extent_bytes
        home = self._homes.get(extent)
        if home is None:
            return self._read_file(extent, place)
        self._copy(self._reads, place, home)
        return _Enqueued(place.last)

    def write(self, extent: int, frame: Tensor) -> Transfer:
        """Enqueue a copy to pinned memory, and have the file's thread take it from there if the extent has no home."""
        self._check_open()
        place = self._frames[frame.data_ptr()]
        self._moved.bytes_written += self.extent_bytes
        if extent not in self._homes and self._spare:
            self._homes[extent] = self._spare.pop()
        home = self._homes.get(extent)
        if home is None:
            return self._write_file(extent, place)
        self._copy(self._writes, home, place)
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
        """What is pinned, and the size of the file."""
        pinned = {"pinned": sum(slab.nbytes for slab in self._slabs)}
        return pinned if self.file is None else {**pinned, **self.file.bytes_by_tier()}

    def close(self) -> None:
        """Wait for all that was enqueued on frames and pinned memory, and give both back."""
        if os.getpid() != self._owner:  # a forked child cannot use the device
            return
        if self._closed:
            return
        self._closed = True
        try:
            if self.file is not None:
                self.file.close()
            for place in (*self._frames.values(), *self._homes.values(), *self._inbound, *self._outbound):
                place.finish()
        finally:
            self._frames, self._homes, self._spare = {}, {}, []
            self._inbound.clear()
            self._outbound.clear()
            while self._slabs:
                self.device.unpin(self._slabs.pop())

    def _read_file(self, extent: int, place: Place) -> Transfer:
        slot = self._inbound[0]
        self._inbound.rotate(-1)
        before = place.last

        def enqueue() -> Event:
            if before is not None:
                self.device.wait(self._reads, before)
            self.device.copy(self._reads, place.memory, slot.memory)
            slot.last = self.device.record(self._reads)
            return slot.last

        # The thread knows what it enqueued on the slot last, and waits for that before it reads into the slot again.
        return _FromFile(self._open_file().read(extent, slot.memory, slot.finish, enqueue), place)

    def _write_file(self, extent: int, place: Place) -> Transfer:
        slot = self._outbound[0]
        self._outbound.rotate(-1)
        if slot.job is not None:
            slot.job.exception()  # until the file has what the slot holds; its own transfer tells what went wrong
        self._copy(self._writes, slot, place)
        slot.job = self._open_file().write(extent, slot.memory, slot.finish)
        return slot.job

    def _open_file(self) -> FileTier:
        if self.file is None:
            raise PagingError("pages: an extent is in no memory, and there is no file")
        return self.file

    def _pinned(self, n: int) -> list[Place]:
        if n <= 0:
            return []
        slab = self.device.pin(n * self.extent_bytes)
        self._slabs.append(slab)
        return [Place(memory) for memory in slab.split(self.extent_bytes)]

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
    """A transfer that a stream will carry out."""

    event: Event | None

    def done(self) -> bool:
        return self.event is None or self.event.query()

    def result(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _FromFile:
    """A read that the file's thread enqueues when it has the extent; `job` gives the event."""

    job: Future[Event | None]
    place: Place

    def done(self) -> bool:
        if not self.job.done():
            return False
        event = None if self.job.exception() else self.job.result()
        return event is None or event.query()

    def result(self) -> None:
        self.place.last = self.job.result()
