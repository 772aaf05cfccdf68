"""What the pages did, for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PagerStats:
    """Counts since a pager was made."""

    sweeps: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0
    peak_frames: int = 0
    frames: int = 0


@dataclass
class TierStats:
    """What went to and from the frames, and how long a background thread took for its part of it."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass(frozen=True)
class PagingStats:
    """Numbers since the optimizer was made; bytes and seconds.

    Attributes:
        budget: the frames' limit. peak: the most that they ever took.
        resident: what they take now. bytes_by_tier: the same, and what pinned memory and the file take.
        hits, misses: extents that a pass found in a frame, and that had to be fetched. passes: steps, saves and loads.
        read, written: what moved to frames and from them. waited: how long the host waited for it.
        read_seconds, write_seconds: how long the background thread took for what moved from and to a file.
    """

    extent_bytes: int
    extents: int
    budget: int
    peak: int
    resident: int
    bytes_by_tier: dict[str, int]
    passes: int
    hits: int
    misses: int
    read: int
    written: int
    waited: float
    read_seconds: float
    write_seconds: float

    @property
    def hit_rate(self) -> float:
        """Part of the extents that were in a frame when needed."""
        return self.hits / max(1, self.hits + self.misses)

    def __str__(self) -> str:
        mib = 2**20
        tiers = ", ".join(f"{size / mib:.1f} MiB {name}" for name, size in self.bytes_by_tier.items())
        return (
            f"paged optimizer states: {self.extents} extents of {self.extent_bytes / mib:.2f} MiB; {tiers}; "
            f"hit rate {self.hit_rate:.0%}, read {self.read / mib:.1f} MiB, wrote {self.written / mib:.1f} MiB, "
            f"waited {self.waited:.2f} s in {self.passes} passes"
        )
