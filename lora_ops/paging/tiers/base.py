"""The contract between the pager and the slow tier behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lora_ops.paging.stats import TierStats


class Transfer(Protocol):
    """A transfer that was asked for."""

    def done(self) -> bool:
        """Whether it has taken place."""

    def result(self) -> object:
        """Raise what went wrong, and return when the frame may be passed to `Tier.acquire`.

        Where the host does the caller's work, that is when the transfer has taken place. Where a stream does it, that
        is as soon as the stream can be told to wait for it: the host itself does not.
        """


class Tier(Protocol):
    """A store of extents, addressed by number.

    Transfers that concern one frame, or one extent, take effect in the order in which they were asked for. Between
    `acquire` and `release` frames are the caller's, whose work on them may be enqueued on a stream and run later.

    Attributes:
        fast: name of the memory that frames are in.
        extent_bytes: size of an extent, and so of a frame.
        directory: a folder that is this tier's own, or None.
    """

    fast: str
    extent_bytes: int

    @property
    def directory(self) -> Path | None: ...

    @property
    def stats(self) -> TierStats: ...

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

    def acquire(self, frames: Sequence[Tensor]) -> None:
        """Have what the caller does from now on come after all that was asked for about these frames."""

    def release(self, frames: Sequence[Tensor]) -> None:
        """Have what is asked for from now on come after what the caller has done, or enqueued, with these frames."""

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes that extents occupy outside the frames, by name of the memory."""

    def close(self) -> None:
        """Finish transfers, give files and memory back. Safe to call twice."""
