"""A pager over what the device has behind its fast memory."""

from __future__ import annotations

import os

from lora_ops.paging.budget import check_extents, choose_extent_bytes
from lora_ops.paging.pager import Pager
from lora_ops.paging.tiers import Device, FileTier, PinnedTier, Tier


def open_pager(
    device: Device | None,
    budget: int,
    *,
    page_dir: str | os.PathLike[str] | None = None,
    host_budget: int | None = None,
    extent_bytes: int | None = None,
) -> Pager:
    """Pages in RAM over a file, or, on a device, over pinned memory and, with page_dir or host_budget, a file as well.

    Args:
        device: that frames are on; None: the host.
        budget: bytes of all frames.
        page_dir: folder of the page file; None: a temporary file.
        host_budget: bytes of pinned memory; None: `budget` with a page_dir, else as many as there are extents for.
        extent_bytes: size of an extent; None: by the budget.

    Raises:
        ValueError: if the budgets do not fit the extents.
        PagingError: if page_dir cannot be used.
    """
    kind = "cpu" if device is None else "cuda"
    extent = choose_extent_bytes(budget, kind) if extent_bytes is None else extent_bytes
    check_extents(budget, extent)
    if host_budget is not None and host_budget < 2 * extent:
        raise ValueError(f"host_budget: expected at least {2 * extent}, two extents of {extent}, got {host_budget}")
    return Pager(_tier(device, budget, page_dir, host_budget, extent), budget // extent)


def _tier(
    device: Device | None, budget: int, page_dir: str | os.PathLike[str] | None, host_budget: int | None, extent: int
) -> Tier:
    if device is None:
        if host_budget is not None:
            raise ValueError("host_budget: expected parameters on a CUDA device; on the CPU page_budget is all of it")
        return FileTier(page_dir, extent)
    if host_budget is None and page_dir is not None:
        host_budget = budget
    if host_budget is None:
        return PinnedTier(device, extent)
    return PinnedTier(device, extent, file=FileTier(page_dir, extent), host_extents=host_budget // extent)
