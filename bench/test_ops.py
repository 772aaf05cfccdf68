"""pytest-benchmark over the same comparisons as `python -m bench`: `pytest bench --benchmark-only`.

Groups are comparisons; a contender that is wrong is not timed: ours fails, a peer is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.measure import OURS, Contender, prepare
from bench.plan import Plan
from bench.suites import SUITES

PLAN = Plan(
    shapes=((1024, 1024),),
    tokens=(1, 8, 64, 512),
    lora_shapes=((1024, 1024),),
    lora_tokens=(512,),
    adapter_dtypes=(torch.bfloat16,),
)
CONTENDERS = (OURS, "dense", "frozen dense", "copy of the dense weight", "bitsandbytes", "PEFT", "PEFT + bitsandbytes")


def _cases() -> Iterator[Any]:
    for op in SUITES:
        for tokens in PLAN.tokens if op.startswith("nf4_linear") else (None,):
            for contender in CONTENDERS:
                yield pytest.param(op, tokens, contender, id="-".join(str(p) for p in (op, tokens, contender) if p))


@pytest.mark.parametrize(("op", "tokens", "contender"), _cases())
def test_op(benchmark: Any, op: str, tokens: int | None, contender: str) -> None:
    """Time one contender of the first comparison of an op at `tokens`."""
    plan = PLAN if tokens is None else replace(PLAN, tokens=(tokens,))
    comparison = next(iter(SUITES[op](plan)))
    if contender not in comparison.makers:
        pytest.skip(f"{op} is not compared with {contender}")
    comparison.makers = {contender: comparison.makers[contender]}
    ready, rows = prepare(comparison)
    if rows:
        verdict = f"{rows[0].status}: {rows[0].reason}"
        if rows[0].bad:
            pytest.fail(verdict)
        pytest.skip(verdict)
    benchmark.group = comparison.id
    timed: Contender = ready[contender]
    benchmark.pedantic(timed.run, rounds=20, warmup_rounds=2)
