"""What the pages did, for people."""

from __future__ import annotations

from dataclasses import dataclass

from lora_ops.optim.states import PagedStates


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


def paging_stats(store: PagedStates) -> PagingStats:
    """Collect the numbers of a store."""
    pager, extent = store.pager, store.extent_bytes
    counts, moved = pager.stats, pager.tier.stats
    resident = counts.frames * extent
    return PagingStats(
        extent_bytes=extent, extents=len(pager.table), budget=pager.n_frames * extent, peak=counts.peak_frames * extent,
        resident=resident, bytes_by_tier={pager.tier.fast: resident, **pager.tier.bytes_by_tier()},
        passes=counts.sweeps, hits=counts.hits, misses=counts.misses,
        read=moved.bytes_read, written=moved.bytes_written, waited=counts.wait_seconds,
        read_seconds=moved.read_seconds, write_seconds=moved.write_seconds,
    )  # fmt: skip
