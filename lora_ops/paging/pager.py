"""The page layer: extents of fixed size, an explicit page table, a hard budget of frames; schedule.py is its policy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor

from lora_ops.paging.errors import PagingError
from lora_ops.paging.native_pass import NativePass
from lora_ops.paging.schedule import Page, Schedule, extents_ahead
from lora_ops.paging.stats import PagerStats, PagingStats
from lora_ops.paging.tiers import FileTier, Tier, Transfer


class Pager:
    """Extents behind a fixed number of frames.

    Args:
        tier: where extents live that are in no frame; it also makes the frames.
        n_frames: frames, all that the fast tier ever holds; at least 1, and 2 for transfers to overlap.
    """

    def __init__(self, tier: Tier, n_frames: int) -> None:
        if n_frames < 1:
            raise ValueError(f"n_frames: expected at least 1, got {n_frames}")
        self.tier = tier
        self.n_frames = n_frames
        self.table: list[Page] = []
        self.stats = PagerStats()
        self._free: list[Tensor] = []
        self._reads: deque[tuple[int, Transfer]] = deque()  # of the pass under way
        self._writes: deque[Transfer] = deque()
        self._sweeping = False
        self._touched: tuple[tuple[int, ...], list[int]] | None = None  # of the last pass, if `touch` was it

    def allocate(self, n: int = 1) -> range:
        """Add extents that hold zeros; answers their numbers.

        Raises:
            PagingError: if the tier has no room for them.
        """
        first = len(self.table)
        if first + n > self.n_frames:
            self.tier.reserve(first + n)
        self.table += [Page() for _ in range(n)]
        return range(first, first + n)

    def reset(self) -> None:
        """Forget every extent, and what went wrong with it; frames and the tier's room are kept for new ones."""
        while self._writes:
            with suppress(PagingError):
                self._writes.popleft().result()
        self._free += [page.frame for page in self.table if page.frame is not None]
        self.table = []
        self._touched = None

    def sweep(
        self, extents: Sequence[int], *, read: bool = True, write: bool = True
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """Yield batches of (extent, frame) until each extent was there once; a frame is its extent's until the next.

        Args:
            extents: distinct numbers.
            read: whether what they hold is needed; otherwise a fetched frame holds zeros.
            write: whether the caller changes them.
        """
        with self._alone():
            schedule = self._start(extents)
            try:
                yield from self._batches(schedule, read, write)
            finally:
                self._settle()

    @contextmanager
    def native_pass(self, extents: Sequence[int], slices: Mapping[int, tuple[int, int]]) -> Iterator[NativePass]:
        """A pass over extents of a `FileTier` that native code reads, changes and moves by itself, within the block.

        Args:
            extents: distinct numbers.
            slices: (begin, end) of each extent's slices in the caller's work.

        Yields:
            The pass, whose `pages` native code takes; its `report` is to be set.

        Raises:
            PagingError: at the end, if the report tells of a failure.
        """
        if not isinstance(self.tier, FileTier):
            raise TypeError(f"tier: expected a FileTier, of which native code moves extents, got {self.tier!r}")
        with self._alone():
            while self._writes:
                self._writes.popleft().result()
            work = self._describe(self._start(extents), slices)
            self.tier.hand_over(work)
            try:
                yield work
            finally:
                self._free = work.settle()
                self.tier.take_back(work)

    def touch(self, extents: tuple[int, ...]) -> list[int] | None:
        """A pass that changes extents which are all in frames, in memory of the host: their addresses.

        Returns:
            None if one of them is in no frame; nothing has been done then.
        """
        self._check_alone()
        self._reap_writes()
        if self._touched is None or self._touched[0] is not extents:  # else all is as the last call left it
            pages = [self.table[e] for e in extents]
            addresses = [page.frame.data_ptr() for page in pages if page.frame is not None]
            if len(addresses) < len(pages):
                return None
            for page in pages:
                page.dirty = True
            self._touched = extents, addresses
        self.stats.sweeps += 1
        self.stats.hits += len(extents)
        return self._touched[1]

    def report(self) -> PagingStats:
        """What happened so far, in bytes."""
        counts, moved, extent = self.stats, self.tier.stats, self.tier.extent_bytes
        resident = counts.frames * extent
        return PagingStats(
            extent_bytes=extent, extents=len(self.table), budget=self.n_frames * extent,
            peak=counts.peak_frames * extent, resident=resident,
            bytes_by_tier={self.tier.fast: resident, **self.tier.bytes_by_tier()},
            passes=counts.sweeps, hits=counts.hits, misses=counts.misses,
            read=moved.bytes_read, written=moved.bytes_written, waited=counts.wait_seconds,
            read_seconds=moved.read_seconds, write_seconds=moved.write_seconds,
        )  # fmt: skip

    def close(self) -> None:
        """Give back frames, files and the thread."""
        self.table = []
        self._free = []
        self._touched = None
        self.tier.close()

    def _check_alone(self) -> None:
        if self._sweeping:
            raise PagingError("pages: a pass over the extents is already under way")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._check_alone()
        self._sweeping = True
        try:
            yield
        finally:
            self._sweeping = False

    def _start(self, extents: Sequence[int]) -> Schedule:
        self._touched = None
        schedule = Schedule(self.table, extents)
        self.stats.sweeps += 1
        self.stats.hits += len(schedule.resident)
        self.stats.misses += len(schedule.missing)
        return schedule

    def _describe(self, schedule: Schedule, slices: Mapping[int, tuple[int, int]]) -> NativePass:
        """The pass as native code takes it, with all the frames that it may use."""
        for _ in range(min(self.n_frames - self.stats.frames, len(schedule.missing) - len(self._free))):
            self._free.append(self._new_frame())
        return NativePass(self.table, schedule, self._free, slices)

    def _new_frame(self) -> Tensor:
        self.stats.frames += 1
        self.stats.peak_frames = max(self.stats.peak_frames, self.stats.frames)
        return self.tier.new_frame()

    def _batches(self, schedule: Schedule, read: bool, write: bool) -> Iterator[list[tuple[int, Tensor]]]:
        # Frames of what was streamed last are to be passed on: they are computed first.
        while schedule.resident or schedule.missing or self._reads:
            self._fetch_ahead(schedule, read)
            if self._reads and (self._reads[0][1].done() or not schedule.resident):
                extent, transfer = self._reads[0]
                start = time.perf_counter()
                transfer.result()
                self.stats.wait_seconds += time.perf_counter() - start
                self._reads.popleft()
                yield from self._lend([extent], write)
                schedule.streamed.append(extent)
            else:
                batch = schedule.next_resident(others_stream=bool(schedule.missing or self._reads))
                yield from self._lend(batch, write)
                schedule.computed += batch
        self._reap_writes()

    def _lend(self, extents: list[int], write: bool) -> Iterator[list[tuple[int, Tensor]]]:
        """Yield one batch, which is the caller's until it asks for the next, or abandons the pass."""
        batch = self._batch(extents, write)
        frames = [frame for _, frame in batch]
        self.tier.acquire(frames)
        try:
            yield batch
        finally:
            self.tier.release(frames)

    def _batch(self, extents: list[int], write: bool) -> list[tuple[int, Tensor]]:
        batch = []
        for e in extents:
            page = self.table[e]
            if page.frame is None:
                raise PagingError(f"pages: extent {e} lost its frame")
            page.dirty |= write
            batch.append((e, page.frame))
        return batch

    def _fetch_ahead(self, schedule: Schedule, read: bool) -> None:
        while schedule.missing and len(self._reads) < extents_ahead(self.n_frames):
            frame = self._take_frame(schedule)
            if frame is None:
                return
            extent = schedule.missing.popleft()
            page = self.table[extent]
            fetch = read and page.stored
            try:
                transfer = self.tier.read(extent, frame) if fetch else self.tier.clear(frame)
            except BaseException:  # refused: the frame holds what it held, which is not the extent
                self._free.append(frame)
                raise
            page.frame = frame
            page.dirty = page.stored and not fetch
            self._reads.append((extent, transfer))

    def _take_frame(self, schedule: Schedule) -> Tensor | None:
        if self._free:
            return self._free.pop()
        if self.stats.frames < self.n_frames:
            return self._new_frame()
        victim = schedule.victim()
        if victim is None:
            return None
        page = self.table[victim]
        if page.dirty and page.frame is not None:
            self._reap_writes()  # may raise, and so may write: the frame is the victim's until both have passed
            self._writes.append(self.tier.write(victim, page.frame))
            page.dirty, page.stored = False, True
        frame, page.frame = page.frame, None
        return frame

    def _reap_writes(self) -> None:
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()

    def _settle(self) -> None:
        """Let transfers of a pass that was cut short finish, and take back frames whose content is not an extent's."""
        while self._reads:
            extent, transfer = self._reads.popleft()
            try:
                transfer.result()
            except PagingError:  # the caller has it already, or gave up on the pass
                page = self.table[extent]
                if page.frame is not None:
                    self._free.append(page.frame)
                page.frame = None
