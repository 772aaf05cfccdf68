"""What ran: a trace of op calls, with the backend that served each and why no faster one did."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Process-wide and not per thread: autograd runs the backward of a CUDA graph on threads of its own.
_lock = threading.Lock()
open_traces: list[Trace] = []  # one that is empty costs an op no call


@dataclass(frozen=True)
class OpCall:
    """One call of an op, as a trace records it: what ran, where, in which dtype, and why no faster backend did."""

    op: str
    backend: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Trace:
    """The calls recorded by `trace()`, in order."""

    calls: list[OpCall] = field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """One row for each (op, backend, device, dtype, reason) with its `count`, most frequent first."""
        rows = Counter((c.op, c.backend, c.device, c.dtype, c.reason) for c in self.calls)
        keys = ("op", "backend", "device", "dtype", "reason")
        return [dict(zip(keys, row, strict=True), count=n) for row, n in rows.most_common()]

    def backends(self, op: str | None = None) -> set[str]:
        """Names of the backends that ran `op` (any op, if None)."""
        return {c.backend for c in self.calls if op is None or c.op == op}

    def __str__(self) -> str:
        lines = [f"{r['count']:>6} × {r['op']:<24} {r['backend']:<10} {r['device']} {r['dtype']}  {r['reason']}"
                 for r in self.summary()]  # fmt: skip
        return "\n".join(lines) or "no lora_ops op was called"


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every op call of the process while the context is open.

    Returns:
        A context manager that yields a `Trace`; `trace.summary()` gives its rows, `print(trace)` a table.
    """
    record = Trace()
    with _lock:
        open_traces.append(record)
    try:
        yield record
    finally:
        with _lock:
            # By identity: two traces opened around the same calls compare equal.
            open_traces[:] = [t for t in open_traces if t is not record]


def record(call: OpCall) -> None:
    """Note a call in every open trace."""
    with _lock:
        for opened in open_traces:
            opened.calls.append(call)
