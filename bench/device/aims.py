"""What the library aims at on an H200-class GPU, and whether the rows of a run reach it.

Ratios are over cuBLAS in bfloat16: lora_linear's over the frozen layer's forward and dX. The worst row decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import OURS, Row

Values = Callable[[Sequence[Row]], Iterator[tuple[Row, float | None]]]


@dataclass(frozen=True)
class Aim:
    """One line of the table.

    Attributes:
        text: what is measured.
        limit: what the worst value must reach.
        at_least: whether larger is better.
        values: the rows of ours that count, with their values; None where ours or the other has no time.
    """

    text: str
    limit: float
    at_least: bool
    values: Values


def _over_baseline(op: str, contender: str = OURS, *, inverse: bool = False, **where: Any) -> Values:
    """Time over the baseline's (or its inverse, the speed-up) where each attribute is as given or among those given."""

    def values(rows: Sequence[Row]) -> Iterator[tuple[Row, float | None]]:
        for row in _select(rows, op, contender, **where):
            ratio = row.over_baseline
            yield row, 1 / ratio if ratio and inverse else ratio

    return values


def _over(op: str, others: Sequence[str], contender: str = OURS, *, inverse: bool = False, **where: Any) -> Values:
    """Time over that of the fastest of `others` in the same comparison (or its inverse)."""

    def values(rows: Sequence[Row]) -> Iterator[tuple[Row, float | None]]:
        for row in _select(rows, op, contender, **where):
            beside = [other for other in rows if other.contender in others and _comparison(other) == _comparison(row)]
            times = [other.median_ms for other in beside if other.median_ms is not None]
            if times:
                ratio = None if row.median_ms is None else row.median_ms / min(times)
                yield row, 1 / ratio if ratio and inverse else ratio

    return values


def _of_limit(op: str, **where: Any) -> Values:
    def values(rows: Sequence[Row]) -> Iterator[tuple[Row, float | None]]:
        for row in _select(rows, op, OURS, **where):
            yield row, row.percent_of_limit

    return values


def _select(rows: Sequence[Row], op: str, contender: str, *, variant: str = "", **where: Any) -> Iterator[Row]:
    """Rows of a contender whose variant holds the given text, and whose M, N, K and R are as given or among those."""
    for row in rows:
        if row.op != op or row.contender != contender or variant not in row.variant:
            continue
        if row.status == "unavailable":
            continue
        asked = {name: value if isinstance(value, tuple) else (value,) for name, value in where.items()}
        if all(getattr(row, name) in value for name, value in asked.items()):
            yield row


def _comparison(row: Row) -> tuple[Any, ...]:
    return row.op, row.variant, row.m, row.n, row.k, row.r


LAYERS = (4096, 14336)  # N of the layers that the aims are set for
_LORA = {"m": 8192, "n": 4096, "k": 4096, "r": 16}
_CUDA = f"{OURS} cuda"  # off by default: faster than Triton's or not is what decides
OVERSUBSCRIBED, FITS = "twice oversubscribed", "everything fits"  # variants of paged_adamw
_BY_HAND = ("eager PEFT formula", "addmm by hand")

AIMS = (
    Aim("lora_linear K-step, M=8192, 4096², r=16, p=0, over frozen dense", 1.12, False,
        _over_baseline("lora_linear", f"{OURS} K-step", variant="p=0,", **_LORA)),
    Aim("lora_linear K-step, the same with p=0.1", 1.18, False,
        _over_baseline("lora_linear", f"{OURS} K-step", variant="p=0.1,", **_LORA)),
    Aim("lora_linear β=1, the same, p=0 and 0.1", 1.17, False,
        _over_baseline("lora_linear", f"{OURS} β=1", variant="dense,", **_LORA)),
    Aim("lora_linear over the faster of eager and cuBLAS + addmm", 1.0, False,
        _over("lora_linear", _BY_HAND, n=4096, k=4096, r=16)),
    Aim("nf4_linear, M ≥ 4096, over dense", 1.05, False, _over_baseline("nf4_linear", m=(4096, 8192))),
    Aim("nf4_linear dX, M ≥ 4096, over dense", 1.05, False, _over_baseline("nf4_linear_dx", m=(4096, 8192))),
    Aim("nf4_linear, M = 16–64, times as fast as bitsandbytes", 1.5, True,
        _over("nf4_linear", ("bitsandbytes",), inverse=True, m=(16, 32, 64))),
    Aim("nf4_linear, M = 1, times as fast as dense", 2.0, True,
        _over_baseline("nf4_linear", inverse=True, m=1, n=LAYERS)),
    Aim("the same of the CUDA C++ kernels, M = 16–64", 1.5, True,
        _over("nf4_linear", ("bitsandbytes",), _CUDA, inverse=True, m=(16, 32, 64))),
    Aim("the same of the CUDA C++ kernels, M = 1", 2.0, True,
        _over_baseline("nf4_linear", _CUDA, inverse=True, m=1, n=LAYERS)),
    Aim("paged AdamW, twice oversubscribed, part of the pinned bandwidth", 0.8, True,
        _over_baseline("paged_adamw", inverse=True, variant=OVERSUBSCRIBED)),
    Aim("paged AdamW, twice oversubscribed, times as fast as bitsandbytes' paged one", 2.0, True,
        _over("paged_adamw", ("bitsandbytes",), inverse=True, variant=OVERSUBSCRIBED)),
    Aim("paged AdamW, everything fits, over unpaged", 1.01, False, _over_baseline("paged_adamw", variant=FITS)),
    Aim("dequantize, double-quantized, % of the copy bandwidth", 80.0, True,
        _of_limit("dequantize", variant="out=, double", n=LAYERS)),
)  # fmt: skip


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table: each aim with the worst value, where that was, and "reached", "missed" or "unmeasured"."""
    table = []
    for aim in AIMS:
        found = list(aim.values(rows))
        broken = [row for row, _ in found if row.status != "ok"]
        ordered = sorted(((v, row.where) for row, v in found if v is not None), reverse=not aim.at_least)
        value, where = ordered[0] if ordered else (None, "")
        verdict = "unmeasured"
        if broken:
            verdict, where = "missed", f"{broken[0].where}: {broken[0].status}"
        elif value is not None:
            verdict = "reached" if (value >= aim.limit if aim.at_least else value <= aim.limit) else "missed"
        sign = "≥" if aim.at_least else "≤"
        table.append({"aim": aim.text, "limit": f"{sign} {aim.limit:g}", "worst": value, "where": where,
                      "rows": len(found), "verdict": verdict})  # fmt: skip
    return table
