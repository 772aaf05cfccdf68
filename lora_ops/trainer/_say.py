"""What a run has to tell its user: once, and under a launcher of several processes by the first of them alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

logger = logging.getLogger("lora_ops")
_SHOWN = 5
_ERROR_CHARS = 400


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 among those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def warn(message: str) -> None:
    """Log a warning, unless another process does."""
    if is_first_process():
        logger.warning(message)


def some(items: Sequence[object]) -> str:
    """Write a list out, or its first entries where it is long: "4, 17, 90, 91, 92, ..."."""
    return ", ".join(map(str, items[:_SHOWN])) + (", ..." if len(items) > _SHOWN else "")


def one_line(error: BaseException) -> str:
    """An error's text in one line of bounded length; its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _ERROR_CHARS else text[: _ERROR_CHARS - 4] + " ..."
