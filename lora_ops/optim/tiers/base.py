"""The contract between the pager and the slow tier behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """A transfer under way."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> object:
        """Wait until the frame may be used, and raise what went wrong."""


@dataclass
class TierStats:
    """What a tier moved, and how long its side of the transfers took."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


class Tier(Protocol):
    """A store of extents, addressed by number.

    Transfers that concern one frame, or one extent, take effect in the order in which they were asked for.
    """

    name: str
    stats: TierStats

    def new_frame(self) -> Tensor:
        """A frame of the fast tier: uint8 [extent_bytes], zero-filled."""

    def reserve(self, n_extents: int) -> None:
        """Make room for extents 0 … n_extents − 1; raise PagingError if there is none."""

    def read(self, extent: int, frame: Tensor) -> Transfer:
        """Bring an extent into a frame."""

    def write(self, extent: int, frame: Tensor) -> Transfer:
        """Store a frame as an extent."""

    def clear(self, frame: Tensor) -> Transfer:
        """Fill a frame with zeros."""

    def stored_bytes(self) -> int:
        """Bytes that the tier occupies."""

    def close(self) -> None:
        """Finish transfers, give files and memory back. Safe to call twice."""
