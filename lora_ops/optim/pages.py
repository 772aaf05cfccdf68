"""The page layer: extents of fixed size, an explicit page table, a hard budget of frames, and eviction by next use.

A step touches every extent that it needs exactly once, and in which order is ours to choose. Extents that are already
in a frame go first where nothing else is ready; the others are streamed through a few frames, fetched ahead and
written back behind. So each step misses extents − frames of them, which no policy can better, and LRU would miss all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lora_ops.optim.errors import PagingError
from lora_ops.optim.tiers import Tier, Transfer
from lora_ops.optim.tiers.passage import PAGE_CHECKSUM, PAGE_FIELDS, PAGE_FRAME, PAGE_SLICES, PAGE_STORED, Passage

MAX_AHEAD = 8  # extents fetched ahead: enough to cover the jitter of a disk, and not a large part of the budget
RESIDENT_BATCH = 4  # resident extents computed at a time while others stream


@dataclass(slots=True)
class Page:
    """A row of the page table."""

    frame: Tensor | None = None
    dirty: bool = False  # the frame holds what the tier does not
    stored: bool = False  # the tier holds it; an extent that neither holds is zeros


@dataclass
class PagerStats:
    """Counts since the pager was made."""

    sweeps: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0
    peak_frames: int = 0
    frames: int = 0


@dataclass
class Sweep:
    """What one pass still has to do."""

    resident: deque[int]  # in a frame, not yet computed
    missing: deque[int]  # to be fetched
    idle: list[int]  # in a frame and not part of this pass: the first to go
    read: bool
    streamed: list[int] = field(default_factory=list)  # computed; last in, first out
    computed: list[int] = field(default_factory=list)  # computed, was resident: the last to go
    coming: deque[tuple[int, Transfer]] = field(default_factory=deque)

    def victim(self) -> int | None:
        """The extent whose next use is furthest away, among those that this pass needs no more."""
        for extents in (self.idle, self.streamed, self.computed):
            if extents:
                return extents.pop()
        return None


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
        if self._sweeping:
            raise PagingError("pages: a pass over the extents is already under way")
        self._sweeping = True
        work = self._start(extents, read)
        try:
            yield from self._batches(work, write)
        finally:
            self._sweeping = False
            self._settle(work)

    def stream(
        self, extents: Sequence[int], slices: Mapping[int, tuple[int, int]], run: Callable[[Passage], None]
    ) -> None:
        """A pass that reads and changes extents, in which `run` moves them as well as it does the work on them.

        Args:
            extents: distinct numbers.
            slices: (begin, end) of each extent's slices, for `run`.
            run: `FileTier.stream`, which tells in the passage where everything is.
        """
        if self._sweeping:
            raise PagingError("pages: a pass over the extents is already under way")
        self._sweeping = True
        try:
            while self._writes:
                self._writes.popleft().result()
            passage = self._passage(extents, slices)
            try:
                run(passage)
            finally:
                self._adopt(passage)
        finally:
            self._sweeping = False

    def touch(self, extents: tuple[int, ...]) -> list[int] | None:
        """A pass that changes extents which are all in frames, in memory of the host: their addresses.

        Returns:
            None if one of them is in no frame; nothing has been done then.
        """
        if self._sweeping:
            raise PagingError("pages: a pass over the extents is already under way")
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

    def all_in_frames(self, extents: Sequence[int]) -> bool:
        """Whether a pass over these extents moves nothing."""
        return all(self.table[e].frame is not None for e in extents)

    def frames_in_use(self) -> int:
        """Frames that exist; each takes extent_bytes of the fast tier."""
        return self.stats.frames

    def close(self) -> None:
        """Give back frames, files and the thread."""
        self.table = []
        self._free = []
        self._touched = None
        self.tier.close()

    def _passage(self, extents: Sequence[int], slices: Mapping[int, tuple[int, int]]) -> Passage:
        work = self._start(extents, read=True)
        for _ in range(min(self.n_frames - self.stats.frames, len(work.missing) - len(self._free))):
            self._free.append(self._new_frame())
        pages = np.zeros((len(self.table), PAGE_FIELDS), dtype=np.int64)
        frames: list[Tensor] = []
        for e, page in enumerate(self.table):
            pages[e, :PAGE_CHECKSUM] = -1, page.dirty, page.stored
            if page.frame is not None:
                pages[e, PAGE_FRAME] = len(frames)
                frames.append(page.frame)
        for e in extents:
            pages[e, PAGE_SLICES] = slices[e]
        spare = [*pages[work.idle, PAGE_FRAME].tolist(), *range(len(frames), len(frames) + len(self._free))]
        order = np.array([*work.resident, *work.missing], dtype=np.int64)
        return Passage(pages, [*frames, *self._free], order, np.array(spare, dtype=np.int64))

    def _adopt(self, passage: Passage) -> None:
        """Take over where extents are now."""
        used = set()
        for page, (number, dirty, stored) in zip(self.table, passage.pages[:, : PAGE_STORED + 1].tolist(), strict=True):
            page.frame = passage.frames[number] if number >= 0 else None
            page.dirty, page.stored = bool(dirty), bool(stored)
            used.add(number)
        self._free = [frame for number, frame in enumerate(passage.frames) if number not in used]

    def _new_frame(self) -> Tensor:
        self.stats.frames += 1
        self.stats.peak_frames = max(self.stats.peak_frames, self.stats.frames)
        return self.tier.new_frame()

    def _start(self, extents: Sequence[int], read: bool) -> Sweep:
        self._touched = None
        wanted = set(extents)
        work = Sweep(
            resident=deque(e for e in extents if self.table[e].frame is not None),
            missing=deque(e for e in extents if self.table[e].frame is None),
            idle=[e for e, page in enumerate(self.table) if page.frame is not None and e not in wanted],
            read=read,
        )
        self.stats.sweeps += 1
        self.stats.hits += len(work.resident)
        self.stats.misses += len(work.missing)
        return work

    def _batches(self, work: Sweep, write: bool) -> Iterator[list[tuple[int, Tensor]]]:
        # Frames of what was streamed last are to be passed on: they are computed first.
        while work.resident or work.missing or work.coming:
            self._fetch_ahead(work)
            if work.coming and (work.coming[0][1].done() or not work.resident):
                extent, transfer = work.coming[0]
                start = time.perf_counter()
                transfer.result()
                self.stats.wait_seconds += time.perf_counter() - start
                work.coming.popleft()
                yield from self._lend([extent], write)
                work.streamed.append(extent)
            else:
                n = RESIDENT_BATCH if work.missing or work.coming else len(work.resident)
                batch = [work.resident.popleft() for _ in range(min(n, len(work.resident)))]
                yield from self._lend(batch, write)
                work.computed += batch
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

    def _fetch_ahead(self, work: Sweep) -> None:
        ahead = min(MAX_AHEAD, max(1, self.n_frames // 2))
        while work.missing and len(work.coming) < ahead:
            frame = self._take_frame(work)
            if frame is None:
                return
            extent = work.missing.popleft()
            page = self.table[extent]
            fetch = work.read and page.stored
            try:
                transfer = self.tier.read(extent, frame) if fetch else self.tier.clear(frame)
            except BaseException:  # refused: the frame holds what it held, which is not the extent
                self._free.append(frame)
                raise
            page.frame = frame
            page.dirty = page.stored and not fetch
            work.coming.append((extent, transfer))

    def _take_frame(self, work: Sweep) -> Tensor | None:
        if self._free:
            return self._free.pop()
        if self.stats.frames < self.n_frames:
            return self._new_frame()
        victim = work.victim()
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

    def _settle(self, work: Sweep) -> None:
        """Let transfers of a pass that was cut short finish, and take back frames whose content is not an extent's."""
        while work.coming:
            extent, transfer = work.coming.popleft()
            try:
                transfer.result()
            except PagingError:  # the caller has it already, or gave up on the pass
                page = self.table[extent]
                if page.frame is not None:
                    self._free.append(page.frame)
                page.frame = None
