"""What goes wrong with pages and checkpoints, in words that name the file."""

from __future__ import annotations


class PagingError(RuntimeError):
    """What is in pages could not be moved, stored or read back; the message names the file and what to do."""
