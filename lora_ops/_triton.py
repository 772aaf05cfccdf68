"""How Triton kernels are launched: one door, through which the compile gate and the traffic counter watch.

Every launcher calls `launch(kernel, grid, ...)`. While `record_launches()` is open the calls are recorded, and with
`run=False` not executed: the gate compiles exactly the signatures and configs that the real launchers produce.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](*args, **meta)`; meta holds constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


@dataclass
class Recorder:
    """Launches in order; `run` says whether they were executed as well."""

    run: bool
    launches: list[Launch] = field(default_factory=list)


_recorders: list[Recorder] = []


@contextmanager
def record_launches(*, run: bool = True) -> Iterator[Recorder]:
    """Record every launch while the context is open; with run=False nothing is executed and outputs stay unwritten."""
    recorder = Recorder(run)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel[grid](*args, **meta)`; an empty grid launches nothing."""
    if 0 in grid:
        return
    for recorder in _recorders:
        recorder.launches.append(Launch(kernel, grid, args, meta))
    if all(recorder.run for recorder in _recorders):
        kernel[grid](*args, **meta)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
