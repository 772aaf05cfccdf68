"""What native code needs to know of a pass over extents, and what it tells afterwards: csrc/cpu/pages.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lora_ops.runtime import native

# Fields of lora_ops_page, 64 bits each.
PAGE_FRAME, PAGE_DIRTY, PAGE_STORED, PAGE_CHECKSUM, PAGE_SLICES = 0, 1, 2, 3, slice(4, 6)
PAGE_FIELDS = 6


@dataclass(frozen=True)
class Passage:
    """One pass.

    Attributes:
        pages: int64 [extents, PAGE_FIELDS].
        frames: all that may be used.
        order: extents of the pass, those that are in frames first.
        spare: numbers of frames that hold no extent of the pass; the last one is used first.
    """

    pages: NDArray[np.int64]
    frames: Sequence[Tensor]
    order: NDArray[np.int64]
    spare: NDArray[np.int64]

    def table(self, fd: int, extent_bytes: int) -> native.PageTable:
        """The C view, which needs this object as long as it is used."""
        addresses = np.array([frame.data_ptr() for frame in self.frames], dtype=np.int64)
        table = native.PageTable(fd, extent_bytes)
        for name, array in (
            ("frames", addresses), ("pages", self.pages), ("order", self.order), ("spare", self.spare),
        ):  # fmt: skip
            setattr(table, name, array.ctypes.data)
            setattr(table, f"n_{name}", len(array))
        table.keep = addresses
        return table
