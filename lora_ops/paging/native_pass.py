"""A pass over extents of a file in which native code moves them as well as it does the work on them: csrc/cpu/pages.

What native code is told of the page table, as arrays, and what it tells afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lora_ops.paging import native_abi
from lora_ops.paging.schedule import Page, Schedule

# Fields of lora_ops_page, 64 bits each.
_FRAME, _DIRTY, _STORED, _CHECKSUM, _SLICES = 0, 1, 2, 3, slice(4, 6)
_FIELDS = 6


class NativePass:
    """One pass.

    Args:
        table: where extents are; `settle` changes it.
        schedule: of the pass.
        free: frames that hold no extent.
        slices: (begin, end) of each extent's slices in the caller's work.

    Attributes:
        pages: what native code takes.
        report: what native code told; the caller sets it.
    """

    def __init__(
        self, table: Sequence[Page], schedule: Schedule, free: Sequence[Tensor], slices: Mapping[int, tuple[int, int]]
    ) -> None:
        self._table = table
        self._frames: list[Tensor] = []
        rows = []
        for page in table:
            number = -1
            if page.frame is not None:
                number = len(self._frames)
                self._frames.append(page.frame)
            rows.append((number, page.dirty, page.stored, 0, 0, 0))
        self._pages = np.array(rows, dtype=np.int64).reshape(-1, _FIELDS)
        order = schedule.order
        self._pages[order, _SLICES] = np.array([slices[e] for e in order], dtype=np.int64).reshape(-1, 2)
        # Frames that hold no extent of the pass; the last one is used first.
        spare = [*self._pages[schedule.idle, _FRAME].tolist(), *range(len(self._frames), len(self._frames) + len(free))]
        self._frames += free
        addresses = [frame.data_ptr() for frame in self._frames]
        lists = {"frames": addresses, "order": order, "spare": spare}
        self._arrays = {name: np.array(numbers, dtype=np.int64) for name, numbers in lists.items()}
        self.pages = native_abi.PageTable()
        for name, array in {**self._arrays, "pages": self._pages}.items():
            setattr(self.pages, name, array.ctypes.data)
            setattr(self.pages, f"n_{name}", len(array))
        self.report: native_abi.PageReport | None = None

    def open(self, fd: int, extent_bytes: int, checksums: Mapping[int, int]) -> None:
        """Name the file and what it holds."""
        self._sums()[:] = [checksums.get(extent, 0) for extent in range(len(self._pages))]
        self.pages.fd, self.pages.extent_bytes = fd, extent_bytes

    def checksums(self) -> dict[int, int]:
        """Those of the extents that the file holds now."""
        stored = np.flatnonzero(self._pages[:, _STORED])
        return dict(zip(stored.tolist(), self._sums()[stored].tolist(), strict=True))

    def settle(self) -> list[Tensor]:
        """Note in the table where extents are now; answers the frames that hold none."""
        used = set()
        for page, (number, dirty, stored) in zip(self._table, self._pages[:, :_CHECKSUM].tolist(), strict=True):
            page.frame = self._frames[number] if number >= 0 else None
            page.dirty, page.stored = bool(dirty), bool(stored)
            used.add(number)
        return [frame for number, frame in enumerate(self._frames) if number not in used]

    def _sums(self) -> NDArray[np.uint64]:
        return self._pages[:, _CHECKSUM].view(np.uint64)
