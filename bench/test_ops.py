"""pytest-benchmark over the same comparisons as `python -m bench`: `pytest bench --benchmark-only`.

Groups are comparisons; a contender that is wrong is not timed: ours fails, a peer is skipped with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.measure import OURS, prepare
from bench.plan import Plan
from bench.suites import SUITES, adamw

PLAN = Plan(
    shapes=((1024, 1024),),
    tokens=(1, 8, 64, 512),
    lora_shapes=((1024, 1024),),
    lora_tokens=(512,),
    adapter_dtypes=(torch.bfloat16,),
)
# Of each op: how many comparisons it yields at one M, and who takes part (a name that one of them lacks is skipped).
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "quantize": (2, (OURS, "bitsandbytes")),
    "dequantize": (4, (OURS, "copy of the dense weight", "bitsandbytes")),
    "nf4_linear": (1, (OURS, "dense", "bitsandbytes", "bitsandbytes eval")),
    "nf4_linear_dx": (1, (OURS, "dense", "bitsandbytes")),
    "frozen_linear": (1, (OURS, "dense")),
    "lora_linear": (4, (OURS, "frozen dense", "PEFT", "PEFT + bitsandbytes", "addmm by hand")),
    "lora_generation": (1, (OURS, "nf4_linear", "PEFT + bitsandbytes")),
    "adamw": (2, (OURS, "torch fused 32-bit", "bitsandbytes AdamW8bit")),
    "adamw_pages": (4, (OURS, adamw.COMPUTE, adamw.TRANSFERS)),
}


def _cases() -> Iterator[Any]:
    for op, (count, contenders) in CASES.items():
        for tokens in PLAN.tokens if op in ("nf4_linear", "nf4_linear_dx", "frozen_linear") else (None,):
            for index, contender in itertools.product(range(count), contenders):
                label = [op, f"m{tokens}" if tokens else "", str(index) if count > 1 else "", contender]
                yield pytest.param(op, tokens, index, contender, id="-".join(part for part in label if part))


@pytest.mark.parametrize(("op", "tokens", "index", "contender"), _cases())
def test_op(benchmark: Any, op: str, tokens: int | None, index: int, contender: str) -> None:
    """Time one contender of one comparison of an op."""
    plan = PLAN if tokens is None else replace(PLAN, tokens=(tokens,))
    comparison = next(itertools.islice(SUITES[op](plan), index, None))
    if contender not in comparison.makers:
        pytest.skip(f"{comparison.id} is not compared with {contender}")
    comparison.makers = {contender: comparison.makers[contender]}
    ready, rows = prepare(comparison)
    if rows:
        verdict = f"{rows[0].status}: {rows[0].reason}"
        if rows[0].bad:
            pytest.fail(verdict)
        pytest.skip(verdict)
    benchmark.group = comparison.id
    benchmark.pedantic(ready[contender].run, rounds=20, warmup_rounds=2)
