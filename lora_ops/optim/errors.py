"""What goes wrong with pages and checkpoints, in words that name the file."""

from __future__ import annotations


class PagingError(RuntimeError):
    """Optimizer states could not be moved, stored or read back; the message names the file and what to do."""
