"""RAM frames over a file, moved by a background thread with pread and pwrite.

Not mmap: the kernel decides how much of a mapping is resident, and the budget would be a wish.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ops.optim.buffers import bytes_of
from lora_ops.optim.checksum import checksum
from lora_ops.optim.errors import PagingError
from lora_ops.optim.tiers.base import TierStats
from lora_ops.optim.tiers.folder import PageFolder


class FileTier:
    """Extents in the page file of a folder, each with a checksum that stands in memory.

    Args:
        page_dir: folder of the page file; None: a temporary one. Held by one optimizer at a time.
        extent_bytes: size of an extent.

    Raises:
        PagingError: if the folder cannot be used.
    """

    fast = "ram"

    def __init__(self, page_dir: str | os.PathLike[str] | None, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        self.stats = TierStats()
        self._checksums: dict[int, int] = {}
        self._reserved = 0
        self._lock = threading.Lock()
        self.folder = PageFolder(page_dir)
        self.path = self.folder.pages
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.folder.close()
            raise PagingError(f"page_dir: cannot create {self.path}: {error.strerror}") from error
        # One thread: transfers take effect in the order of their calls, which is what keeps a frame's write-back
        # before the read that replaces it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lora_ops-pages")

    @property
    def directory(self) -> Path:
        """The folder of the page file."""
        return self.folder.path

    def new_frame(self) -> Tensor:
        """A frame straight from the kernel: its memory returns when the tensor dies, whatever malloc is tuned to."""
        return torch.frombuffer(mmap.mmap(-1, self.extent_bytes), dtype=torch.uint8)

    def reserve(self, n_extents: int) -> None:
        """Allocate the file's blocks, so that a full disk is an error here and not in the middle of a step."""
        if n_extents <= self._reserved:
            return
        try:
            os.posix_fallocate(self._fd, 0, n_extents * self.extent_bytes)
        except OSError as error:
            raise self._error("cannot grow to", n_extents * self.extent_bytes, error) from error
        self._reserved = n_extents

    def read(
        self,
        extent: int,
        frame: Tensor,
        before: Callable[[], Any] | None = None,
        after: Callable[[], Any] | None = None,
    ) -> Future[Any]:
        """Read an extent and check it.

        Args:
            before, after: called on the thread, around the read; the result is that of `after`.
        """
        return self._submit(before, partial(self._read, extent, frame), after)

    def write(self, extent: int, frame: Tensor, before: Callable[[], Any] | None = None) -> Future[Any]:
        """Write a frame and note its checksum; `before` is called on the thread before that."""
        return self._submit(before, partial(self._write, extent, frame))

    def clear(self, frame: Tensor) -> Future[None]:
        """Zero a frame, after the write-back of what it held."""
        return self._submit(partial(_clear, frame))

    def acquire(self, frames: Sequence[Tensor]) -> None:
        """Nothing: the host does the caller's work, and it has waited for the transfers."""

    def release(self, frames: Sequence[Tensor]) -> None:
        """Nothing: the caller's work is done."""

    def bytes_by_tier(self) -> dict[str, int]:
        """Size of the page file."""
        return {"file": self._reserved * self.extent_bytes}

    def close(self) -> None:
        """Wait for the thread and delete the file."""
        with self._lock:
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
        self._worker.shutdown(wait=os.getpid() == self.folder.owner, cancel_futures=True)
        os.close(fd)
        self.folder.close()

    def _submit(self, *work: Callable[[], Any] | None) -> Future[Any]:
        if self._fd < 0:
            raise PagingError(f"{self.path}: the optimizer that owned these pages was closed")
        if os.getpid() != self.folder.owner:
            raise PagingError(f"{self.path}: belongs to process {self.folder.owner}, of which this one is a fork")
        return self._worker.submit(_in_turn, work)

    def _read(self, extent: int, frame: Tensor) -> None:
        start = time.perf_counter()
        view, offset = bytes_of(frame), extent * self.extent_bytes
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise self._error("cannot read byte", offset + done, error) from error
            if n == 0:
                raise PagingError(
                    f"{self.path}: truncated: extent {extent} should end at byte {offset + len(view)}, the file ends "
                    f"at {offset + done}; the states are lost, resume from a checkpoint"
                )
            done += n
        if checksum(view) != self._checksums.get(extent):
            raise PagingError(
                f"{self.path}: extent {extent} (bytes {offset} to {offset + len(view)}) is not what was written there: "
                "checksum mismatch; the states are lost, resume from a checkpoint"
            )
        self.stats.bytes_read += done
        self.stats.read_seconds += time.perf_counter() - start

    def _write(self, extent: int, frame: Tensor) -> None:
        start = time.perf_counter()
        view, offset = bytes_of(frame), extent * self.extent_bytes
        self._checksums[extent] = checksum(view)
        done = 0
        while done < len(view):
            try:
                done += os.pwritev(self._fd, [view[done:]], offset + done)
            except OSError as error:  # noqa: PERF203
                raise self._error("cannot write byte", offset + done, error) from error
        self.stats.bytes_written += done
        self.stats.write_seconds += time.perf_counter() - start

    def _error(self, what: str, number: int, error: OSError) -> PagingError:
        advice = "; free space on that disk or choose another page_dir" if error.errno == errno.ENOSPC else ""
        return PagingError(f"{self.path}: {what} {number}: {error.strerror}{advice}")


def _in_turn(work: Sequence[Callable[[], Any] | None]) -> Any:
    """Do all of it; answers the last result."""
    result = None
    for part in work:
        result = None if part is None else part()
    return result


def _clear(frame: Tensor) -> None:
    frame.numpy().fill(0)
