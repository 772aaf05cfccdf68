"""Measures this GPU's crossovers (runtime/crossovers.py): both routes by number of tokens, and from where one wins.

A field is answered by the split of the tokens measured that costs least: with ρ(M) = time of the route for few tokens
over that of the route for many, the first j numbers of tokens go to the former, where Σ_{i <= j} log ρ(M_i) is least.
One noisy number thus moves the split no further than its own weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.clocks import Clock
from bench.device.context import Context
from bench.measure import OURS, Comparison, Row, measure
from bench.plan import Effort, Plan
from bench.suites import lora_linear, nf4_linear
from bench.suites.common import by_tokens, on_route
from tests.cases import LinearCase

NEVER = 2**62
EFFORT = Effort(min_rounds=10, max_rounds=40, seconds=0.25, warmup=2)


@dataclass(frozen=True)
class Route:
    """A contender's name, and what crossovers.force is told to take it."""

    name: str
    forced: dict[str, int]


@dataclass(frozen=True)
class Question:
    """One field of Crossovers.

    Attributes:
        field: its name.
        tokens: what is measured, ascending.
        few, many: the route for few tokens, and the one for many.
        comparisons: of one number of tokens; their "lora_ops" contender is run on both routes.
        answer: from the tokens and how many of them go to `few`, the field's value.
    """

    field: str
    tokens: tuple[int, ...]
    few: Route
    many: Route
    comparisons: Callable[[Plan, Sequence[int]], Iterator[Comparison]]
    answer: Callable[[Sequence[int], int], int]


def _forward(plan: Plan, tokens: Sequence[int]) -> Iterator[Comparison]:
    for n, k in plan.shapes:
        for inputs in by_tokens(LinearCase(0, n, k, dtype=plan.dtype), tokens, plan.device):
            yield nf4_linear.compare_forward(plan, inputs)


def _both(plan: Plan, tokens: Sequence[int]) -> Iterator[Comparison]:
    for n, k in plan.shapes:
        for inputs in by_tokens(LinearCase(0, n, k, dtype=plan.dtype), tokens, plan.device):
            yield nf4_linear.compare_forward(plan, inputs)
            yield nf4_linear.compare_dx(plan, inputs)


def _lora(plan: Plan, tokens: Sequence[int]) -> Iterator[Comparison]:
    r, adapter = plan.ranks[0], plan.adapter_dtypes[-1]
    for (n, k), p in itertools.product(plan.lora_shapes, plan.dropouts):
        case = LinearCase(0, n, k, r, plan.dtype, weight="dense", adapter_dtype=adapter, dropout_p=p)
        for inputs in by_tokens(case, tokens, plan.device):
            yield lora_linear.compare(plan, inputs)


def _up_to(tokens: Sequence[int], few: int) -> int:
    return tokens[few - 1] if few else 0


def _from(tokens: Sequence[int], few: int) -> int:
    return tokens[few] if few < len(tokens) else NEVER


QUESTIONS = (
    Question(
        "nf4_gemv_max_m", (1, 2, 3, 4),
        Route("GEMV", {"nf4_gemv_max_m": 4}), Route("GEMM", {"nf4_gemv_max_m": 0, "nf4_gemm_max_m": NEVER}),
        _forward, _up_to,
    ),
    Question(
        "nf4_gemm_max_m", (16, 32, 64, 128, 192, 256, 384, 512),
        Route("GEMM", {"nf4_gemm_max_m": NEVER}), Route("decode + cuBLAS", {"nf4_gemm_max_m": 0}),
        _both, _up_to,
    ),
    Question(
        "kstep_min_m", (512, 1024, 2048, 4096, 8192),
        Route("β=1", {"kstep_min_m": NEVER}), Route("K-step", {"kstep_min_m": 0}),
        _lora, _from,
    ),
)  # fmt: skip


def best_split(ratios: Sequence[float]) -> int:
    """How many of the first go to the route for few, so that the product of all times is least."""
    total, least, split = 0.0, 0.0, 0
    for index, ratio in enumerate(ratios, 1):
        total += math.log(ratio)
        if total < least:
            least, split = total, index
    return split


def answer(question: Question, rows: Sequence[Row]) -> tuple[int | None, dict[int, float]]:
    """The field's value, None without times, and ρ by tokens: the geometric mean over shapes and directions."""
    few, many = (f"{OURS} {route.name}" for route in (question.few, question.many))
    logs: dict[int, list[float]] = {}
    for row in rows:
        if row.contender != few or row.median_ms is None:
            continue
        beside = [other.median_ms for other in rows if other.contender == many and _same(other, row)]
        logs.setdefault(row.m, []).extend(math.log(row.median_ms / ms) for ms in beside if ms is not None)
    ratios = {m: math.exp(sum(found) / len(found)) for m, found in sorted(logs.items()) if found}
    if not ratios:
        return None, {}
    return question.answer(tuple(ratios), best_split(tuple(ratios.values()))), ratios


def _same(a: Row, b: Row) -> bool:
    return (a.op, a.variant, a.m, a.n, a.k, a.r) == (b.op, b.variant, b.m, b.n, b.k, b.r)


def _routes(question: Question, comparison: Comparison) -> Comparison:
    """The comparison's own contender on both routes and nobody else."""
    ours, names = comparison.makers[OURS], [f"{OURS} {route.name}" for route in (question.few, question.many)]
    makers = {
        name: on_route(ours, **route.forced)
        for name, route in zip(names, (question.few, question.many), strict=True)
    }  # fmt: skip
    variant = f"{comparison.op} {comparison.variant}".strip()
    return replace(comparison, op=f"tune_{question.field}", variant=variant, makers=makers, baseline=names[1])


def tune(context: Context, questions: Sequence[Question] = QUESTIONS) -> Iterator[str]:
    """Answer every question into context.run.crossovers; yields after each comparison and each answer."""
    clock: Clock = context.clock
    effort = context.plan.effort if context.dry else EFFORT
    for question in questions:
        tokens = question.tokens[:2] if context.dry else question.tokens
        rows: list[Row] = []
        for comparison in question.comparisons(context.plan, tokens):
            comparison = _routes(question, comparison)
            rows += measure(comparison, clock, context.ceilings, effort)
            context.run.rows += rows[-2:]
            yield comparison.id
        value, ratios = answer(question, rows)
        told = ", ".join(f"{m}: {ratio:.2f}" for m, ratio in ratios.items())
        if value is not None:
            context.run.crossovers[question.field] = value
        said = "never" if value == NEVER else "not measured" if value is None else str(value)
        context.run.notes.append(
            f"- {question.field}: {said}; time of {question.few.name} over {question.many.name} by tokens: {told}"
        )
        yield f"{question.field} = {said}"
