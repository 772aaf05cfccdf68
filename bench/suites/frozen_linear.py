"""y = x Wᵀ and dX over a dense frozen weight, against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Comparison, Contender
from bench.plan import Plan
from bench.suites.common import Judge, by_tokens, ours, tensor_bytes
from lora_ops.functional import frozen_linear
from tests.cases import LinearCase, LinearInputs


def forward_backward(plan: Plan) -> Iterator[Comparison]:
    """A training step's share of a frozen layer without an adapter, such as the output head."""
    for n, k in plan.shapes:
        for inputs in by_tokens(LinearCase(0, n, k, dtype=plan.dtype, weight="dense"), plan.tokens, plan.device):
            yield _compare(plan, inputs)


def _compare(plan: Plan, i: LinearInputs) -> Comparison:
    judge, x = Judge(i), i.x.detach().requires_grad_()
    assert isinstance(i.weight, Tensor)
    weight: Tensor = i.weight

    def contender(linear: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        def run() -> dict[str, Tensor]:
            y = linear(x, weight)
            (dx,) = torch.autograd.grad(y, x, i.dy)
            return {"y": y.detach(), "dx": dx}

        return Contender(run, lambda: judge.wrong(run()), 2 * weight.nbytes + 2 * tensor_bytes(i.x, i.dy))

    makers = {**ours(plan, lambda: contender(frozen_linear)), "dense": lambda: contender(F.linear)}
    c = i.case
    return Comparison("frozen_linear", "", c.m, c.n, c.k, 4.0 * c.m * c.n * c.k, "dense", makers)
