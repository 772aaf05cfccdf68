"""A folder that one optimizer holds: locked, and cleared of what a dead process left."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from lora_ops.paging.errors import PagingError

LOCK_NAME = "lora_ops.lock"
PAGES_NAME = "lora_ops.pages"


class PageFolder:
    """Holds `page_dir` until `close`.

    The lock is flock's: it goes with the process, even one that was killed, so a folder is never stuck.

    Raises:
        PagingError: if the folder cannot be written or another optimizer holds it.
    """

    def __init__(self, page_dir: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.fsdecode(page_dir)).absolute()  # the process may change its folder
            self.path.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW  # what a link points to is not ours to write
            self._lock = os.open(self.path / LOCK_NAME, flags, 0o600)
        except (TypeError, ValueError):
            raise ValueError(f"page_dir: expected the path of a folder, got {page_dir!r}") from None
        except OSError as error:
            raise PagingError(f"page_dir: cannot write in {page_dir}: {error.strerror} ({error.filename})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise PagingError(
                f"page_dir: {self.path} is in use by process {holder}, which holds {self.path / LOCK_NAME}; "
                "give every optimizer and every process a page_dir of its own"
            ) from error
        self.owner = os.getpid()
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{self.owner}\n".encode(), 0)
            self.pages.unlink(missing_ok=True)  # left by a process that was killed
        except OSError as error:
            with suppress(OSError):  # whose reason is that of the first error
                self.close()
            raise PagingError(f"page_dir: cannot write in {self.path}: {error.strerror} ({error.filename})") from error

    @property
    def pages(self) -> Path:
        """The page file."""
        return self.path / PAGES_NAME

    def close(self) -> None:
        """Delete the page file and let go of the folder."""
        if self._lock < 0 or os.getpid() != self.owner:  # a forked child does not own it
            return
        try:
            self.pages.unlink(missing_ok=True)
            (self.path / LOCK_NAME).unlink(missing_ok=True)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # explicitly: a forked child may hold the descriptor
            os.close(self._lock)
            self._lock = -1
