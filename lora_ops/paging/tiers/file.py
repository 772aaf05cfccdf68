"""RAM frames over a file, moved by a background thread with pread and pwrite.

Not mmap: the kernel decides how much of a mapping is resident, and the budget would be a wish.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ops.paging import native_abi
from lora_ops.paging.buffers import bytes_of
from lora_ops.paging.checksum import checksum
from lora_ops.paging.errors import PagingError
from lora_ops.paging.native_pass import NativePass
from lora_ops.paging.stats import TierStats
from lora_ops.paging.tiers.folder import PageFolder


class FileTier:
    """Extents in the page file of a folder, each with a checksum that stands in memory.

    Args:
        page_dir: folder of the page file, held by one optimizer at a time; None: a temporary file without a name,
            whose space returns even when the process is killed.
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
        self._owner = os.getpid()
        self.folder = None if page_dir is None else PageFolder(page_dir)
        self.path = (
            Path(tempfile.gettempdir(), "lora_ops.pages (temporary)") if self.folder is None else self.folder.pages
        )
        try:
            self._fd = self._open()
        except OSError as error:
            if self.folder is not None:
                self.folder.close()
            raise PagingError(f"page_dir: cannot create {self.path}: {error.strerror}") from error
        # One thread: transfers take effect in the order of their calls, which is what keeps a frame's write-back
        # before the read that replaces it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lora_ops-pages")

    def _open(self) -> int:
        if self.folder is not None:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with tempfile.TemporaryFile(prefix="lora_ops-pages-", buffering=0) as file:
            return os.dup(file.fileno())

    @property
    def directory(self) -> Path | None:
        """The folder of the page file; a temporary file has none of its own."""
        return None if self.folder is None else self.folder.path

    def new_frame(self) -> Tensor:
        """A frame straight from the kernel: its memory returns when the tensor dies, whatever malloc is tuned to.

        Private: a forked process has a copy, and what it does to it is not done to ours. Small pages, as a tensor has:
        with huge ones a step in 32 bits took 1.02 to 1.36 times as long (Zen 4).
        """
        memory = mmap.mmap(-1, self.extent_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=torch.uint8)

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

    def hand_over(self, work: NativePass) -> None:
        """Let native code move extents, on its threads and not on the one here; none may be on its way."""
        self._check_usable()
        work.open(self._fd, self.extent_bytes, self._checksums)

    def take_back(self, work: NativePass) -> None:
        """Note what it moved; raises what went wrong."""
        self._checksums.update(work.checksums())
        report = work.report
        if report is None:
            return
        self.stats.bytes_read += report.bytes_read
        self.stats.bytes_written += report.bytes_written
        self.stats.read_seconds += report.read_ns / 1e9
        self.stats.write_seconds += report.write_ns / 1e9
        if report.failure:
            raise self._failure(report)

    def bytes_by_tier(self) -> dict[str, int]:
        """Size of the page file."""
        return {"file": self._reserved * self.extent_bytes}

    def close(self) -> None:
        """Wait for the thread and delete the file."""
        with self._lock:
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
        self._worker.shutdown(wait=os.getpid() == self._owner, cancel_futures=True)
        os.close(fd)
        if self.folder is not None:
            self.folder.close()

    def _check_usable(self) -> None:
        if self._fd < 0:
            raise PagingError(f"{self.path}: the optimizer that owned these pages was closed")
        if os.getpid() != self._owner:
            raise PagingError(f"{self.path}: belongs to process {self._owner}, of which this one is a fork")

    def _submit(self, *work: Callable[[], Any] | None) -> Future[Any]:
        self._check_usable()
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
                raise self._truncated(extent, offset + done)
            done += n
        if checksum(view) != self._checksums.get(extent):
            raise self._changed(extent)
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

    def _truncated(self, extent: int, end: int) -> PagingError:
        return PagingError(
            f"{self.path}: truncated: extent {extent} should end at byte {(extent + 1) * self.extent_bytes}, the file "
            f"ends at {end}; the states are lost, resume from a checkpoint"
        )

    def _changed(self, extent: int) -> PagingError:
        begin, end = extent * self.extent_bytes, (extent + 1) * self.extent_bytes
        return PagingError(
            f"{self.path}: extent {extent} (bytes {begin} to {end}) is not what was written there: "
            "checksum mismatch; the states are lost, resume from a checkpoint"
        )

    def _failure(self, report: native_abi.PageReport) -> PagingError:
        if report.failure == report.IO_CHECKSUM:
            return self._changed(report.failed_extent)
        if report.failure == report.IO_TRUNCATED:
            return self._truncated(report.failed_extent, report.failed_byte)
        what = "cannot read byte" if report.failure == report.IO_READ else "cannot write byte"
        return self._error(what, report.failed_byte, OSError(report.failed_errno, os.strerror(report.failed_errno)))

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
