"""torch.compile as a contender: of bounded time, because a compilation may take minutes and a GPU is lent for few."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.measure import Unavailable

ONE_S = 45.0  # for one contender's compilations
ALL_S = 90.0  # for those of the process

_spent = 0.0


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`, if they are finite; elsewhere there is no limit."""
    if seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def compiling() -> Iterator[None]:
    """Time that is spent within counts as compilation, and is limited."""
    global _spent
    if _spent > ALL_S:
        raise Unavailable(f"compilations have taken {_spent:.0f} s; {ALL_S:g} are allowed")
    # One function is compiled anew for each comparison; beyond a few versions torch would quietly not compile it.
    torch.compiler.reset()
    begin = time.perf_counter()
    try:
        with time_limit(ONE_S):
            yield
    finally:
        _spent += time.perf_counter() - begin
