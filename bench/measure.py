"""Check first, then time: contenders of one comparison run in turn, A B C A B C, and a wrong one is never timed."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.ceilings import Ceilings
from bench.clocks import Clock
from bench.environment import exception_line, traceback_text
from bench.plan import Effort

OURS = "lora_ops"


class Unavailable(RuntimeError):
    """A contender cannot take part here; the message says why."""


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        run: the call that is timed.
        check: answers why the result is wrong, or None; called once, before any timing.
        bytes: what it must read and write at least, in its own representation of the weight.
        note: what the report should add to its name, such as the backend that the library chose.
        peak_bytes: of memory, where that is measured.
    """

    run: Callable[[], object]
    check: Callable[[], str | None]
    bytes: int
    note: str = ""
    peak_bytes: int = 0


@dataclass
class Comparison:
    """Contenders over the same operands. Each is made on demand, so that a missing peer stops nobody else.

    Attributes:
        op: name of the operation, one table and chart in the report.
        variant: what distinguishes comparisons of one op apart from M, N, K.
        flops: arithmetic of the operation.
        baseline: the contender that ratios are taken over, or a name for the slowest of `slowest_of`.
        makers: by name; names that begin with "lora_ops" are ours.
        shares_cores: all of `slowest_of` keep every core busy, so that doing them all takes the sum of their times.
    """

    op: str
    variant: str
    m: int
    n: int
    k: int
    flops: float
    baseline: str
    makers: dict[str, Callable[[], Contender]]
    r: int = 0
    slowest_of: tuple[str, ...] = ()
    shares_cores: bool = False

    @property
    def id(self) -> str:
        """A short name, unique in a run."""
        parts = [self.op, self.variant, f"m{self.m}" if self.m else "", f"{self.n}x{self.k}"]
        return " ".join(p for p in parts if p)


@dataclass
class Row:
    """One contender of one comparison, as it stands in the JSON: `status` is ok, wrong, unavailable or failed."""

    op: str
    variant: str
    m: int
    n: int
    k: int
    r: int
    contender: str
    status: str
    reason: str = ""
    detail: str = ""
    note: str = ""
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    rounds: int = 0
    over_baseline: float | None = None
    over_sum: float | None = None
    baseline: str = ""
    gbps: float | None = None
    gflops: float | None = None
    percent_of_limit: float | None = None
    peak_gib: float | None = None

    @property
    def ours(self) -> bool:
        return self.contender.startswith(OURS)

    @property
    def where(self) -> str:
        """The row in a sentence."""
        return f"{self.op} {self.variant} M={self.m} {self.n}x{self.k}: {self.contender}"

    @property
    def bad(self) -> bool:
        """Whether the run must fail: ours is wrong or broke."""
        return self.ours and self.status in ("wrong", "failed")


def prepare(comparison: Comparison) -> tuple[dict[str, Contender], list[Row]]:
    """Make and check every contender: those that may be timed, and the rows of those that may not."""
    c = comparison
    ready: dict[str, Contender] = {}
    rows: list[Row] = []

    def refuse(name: str, status: str, reason: str, detail: str = "") -> None:
        rows.append(Row(c.op, c.variant, c.m, c.n, c.k, c.r, name, status, reason, detail, baseline=c.baseline))

    for name, make in c.makers.items():
        try:
            contender = make()
            wrong = contender.check()
        except Unavailable as error:  # noqa: PERF203
            refuse(name, "unavailable", str(error))
        except Exception as error:  # one contender's failure is a row of the report, and fails the run if it is ours
            refuse(name, "failed", exception_line(error), traceback_text())
        else:
            if wrong:
                refuse(name, "wrong", wrong)
            else:
                ready[name] = contender
    return ready, rows


def measure(comparison: Comparison, clock: Clock, ceilings: Ceilings, effort: Effort) -> list[Row]:
    """Rows of every contender, in the comparison's order."""
    c = comparison
    gc.collect()  # the last comparison's float64 truth may hang in a cycle; on a GPU that is gigabytes
    ready, rows = prepare(c)
    times = clock.interleave({name: contender.run for name, contender in ready.items()}, effort)
    medians = {name: statistics.median(t) for name, t in times.items()}
    over = c.slowest_of or (c.baseline,)
    all_there = medians.keys() >= set(over)
    base = max(medians[name] for name in over) if all_there else None
    total = sum(medians[name] for name in over) if all_there and c.shares_cores else None
    for name, t in times.items():
        seconds, contender = medians[name], ready[name]
        least = max(contender.bytes / ceilings.copy_bytes_per_s, c.flops / ceilings.flops_per_s)
        ordered = sorted(t)
        rows.append(
            Row(
                c.op,
                c.variant,
                c.m,
                c.n,
                c.k,
                c.r,
                name,
                "ok",
                median_ms=seconds * 1e3,
                p10_ms=ordered[len(t) // 10] * 1e3,
                p90_ms=ordered[-1 - len(t) // 10] * 1e3,
                rounds=len(t),
                over_baseline=None if base is None else seconds / base,
                over_sum=None if total is None else seconds / total,
                baseline=c.baseline,
                note=contender.note,
                gbps=contender.bytes / seconds / 1e9,
                gflops=c.flops / seconds / 1e9,
                percent_of_limit=100 * least / seconds,
                peak_gib=contender.peak_bytes / 2**30 or None,
            )
        )
    order = list(c.makers)
    return sorted(rows, key=lambda row: order.index(row.contender))


def one_line(rows: list[Row]) -> str:
    """A comparison's rows for the terminal."""
    return ", ".join(f"{r.contender} {r.status if r.median_ms is None else f'{r.median_ms:.4g} ms'}" for r in rows)


@dataclass
class Run:
    """Everything measured under one policy or on one device."""

    name: str
    ceilings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    aims: list[dict[str, Any]] = field(default_factory=list)
    crossovers: dict[str, int] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        """Whether something of ours is wrong or broke, or a section failed."""
        return bool(self.failures) or any(r.bad for r in self.rows) or any(c["status"] == "wrong" for c in self.checks)
