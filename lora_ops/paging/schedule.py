"""The page table, and the policy of pages in one place: what comes first, whose frame is next, how far to fetch ahead.

A pass touches every extent that it needs exactly once, and in which order is ours to choose. Extents that are already
in a frame stay there until it has come to them; the others are streamed through a few frames, fetched ahead and written
back behind. So each pass misses extents − frames of them, which no policy can better, and LRU would miss all.

Two engines move the bytes by it: `Pager.sweep`, transfer by transfer, and native code (`Pager.native_pass`), which gets
`order`, `idle` and the free frames, and from then on does as `victim` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

MAX_AHEAD = 8  # extents fetched ahead: enough to cover the jitter of a disk, and not a large part of the budget
RESIDENT_BATCH = 4  # resident extents computed at a time while others stream


@dataclass(slots=True)
class Page:
    """A row of the page table: where an extent is. One that neither a frame nor the tier holds is zeros."""

    frame: Tensor | None = None
    dirty: bool = False  # the frame holds what the tier does not
    stored: bool = False  # the tier holds it


def extents_ahead(n_frames: int) -> int:
    """How many extents are fetched before they are needed."""
    return min(MAX_AHEAD, max(1, n_frames // 2))


class Schedule:
    """What one pass still has to do.

    Args:
        table: where extents are.
        extents: distinct numbers of those that the pass needs.

    Attributes:
        resident: in a frame, not yet computed. missing: to be fetched.
        idle: in a frame and not part of this pass.
        streamed, computed: computed already, of those that were missing, and of those that were in a frame.
    """

    def __init__(self, table: Sequence[Page], extents: Sequence[int]) -> None:
        wanted = set(extents)
        self.resident = deque(e for e in extents if table[e].frame is not None)
        self.missing = deque(e for e in extents if table[e].frame is None)
        self.idle = [e for e, page in enumerate(table) if page.frame is not None and e not in wanted]
        self.streamed: list[int] = []
        self.computed: list[int] = []

    @property
    def order(self) -> list[int]:
        """The extents that are left: those in frames, which is no work but the caller's, while others are fetched."""
        return [*self.resident, *self.missing]

    def next_resident(self, *, others_stream: bool) -> list[int]:
        """Extents in frames to compute now: all that are left, unless others may be ready soon."""
        n = min(RESIDENT_BATCH if others_stream else len(self.resident), len(self.resident))
        return [self.resident.popleft() for _ in range(n)]

    def victim(self) -> int | None:
        """The extent whose next use is furthest away: one that is idle, or else the one that was computed last.

        What was streamed goes before what was resident, and of it the last one, which is still in the cache.
        """
        for extents in (self.idle, self.streamed, self.computed):
            if extents:
                return extents.pop()
        return None
