"""y = x Wᵀ and dX over an NF4 weight, against dense torch on the weight rounded to x's dtype and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Comparison, Contender, Unavailable
from bench.peers import bnb_linear, load
from bench.plan import Plan
from bench.suites.common import Judge, no_grad, ours, tensor_bytes
from lora_ops.functional import nf4_linear
from tests.cases import LinearCase, LinearInputs, rounded_weight


def _inputs(plan: Plan) -> Iterator[LinearInputs]:
    for n, k in plan.shapes:
        for m in plan.tokens:
            yield LinearCase(m, n, k, dtype=plan.dtype).inputs(plan.device)


def forward(plan: Plan) -> Iterator[Comparison]:
    """The forward without autograd."""
    for inputs in _inputs(plan):
        yield _forward(plan, inputs)


def _forward(plan: Plan, i: LinearInputs) -> Comparison:
    judge = Judge(i)

    def contender(run: Callable[[], Tensor], weight_bytes: int) -> Contender:
        run = no_grad(run)
        return Contender(run, lambda: judge.wrong({"y": run()}), weight_bytes + tensor_bytes(i.x, i.dy))

    def lora_ops() -> Contender:
        return contender(lambda: nf4_linear(i.x, i.nf4), i.nf4.nbytes)

    def dense() -> Contender:
        w = rounded_weight(i.nf4, i.x.dtype)
        return contender(lambda: F.linear(i.x, w), w.nbytes)

    def bitsandbytes() -> Contender:
        layer = bnb_linear(i.nf4, None, i.x.dtype)
        return contender(lambda: layer(i.x), i.nf4.nbytes)

    def bitsandbytes_eval() -> Contender:
        load("bitsandbytes")
        if i.x.device.type != "cpu" or not _repacks():
            raise Unavailable("only on CPUs with AVX-512 BF16 does eval mode differ")
        if i.x.dtype != torch.bfloat16 or i.case.n % 32 or i.case.k % 64:
            raise Unavailable("eval mode on the CPU needs bfloat16, N % 32 = 0 and K % 64 = 0")
        layer = bnb_linear(i.nf4, None, i.x.dtype).eval()
        return contender(lambda: layer(i.x), i.nf4.nbytes)

    makers = {
        **ours(plan, lora_ops),
        "dense": dense,
        "bitsandbytes": bitsandbytes,
        "bitsandbytes eval": bitsandbytes_eval,
    }
    c = i.case
    return Comparison("nf4_linear", "", c.m, c.n, c.k, 2.0 * c.m * c.n * c.k, "dense", makers)


def _repacks() -> bool:
    return bool(load("bitsandbytes").functional.has_avx512bf16())


def dx(plan: Plan) -> Iterator[Comparison]:
    """The backward alone, through autograd: the graph of one forward is kept."""
    for inputs in _inputs(plan):
        yield _dx(plan, inputs)


def _dx(plan: Plan, i: LinearInputs) -> Comparison:
    judge = Judge(i)

    def contender(forward: Callable[[Tensor], Tensor], weight_bytes: int) -> Contender:
        x = i.x.detach().requires_grad_()
        y = forward(x)

        def run() -> Tensor:
            return torch.autograd.grad(y, x, i.dy, retain_graph=True)[0]

        return Contender(run, lambda: judge.wrong({"dx": run()}), weight_bytes + tensor_bytes(i.x, i.dy))

    def lora_ops() -> Contender:
        return contender(lambda x: nf4_linear(x, i.nf4), i.nf4.nbytes)

    def dense() -> Contender:
        w = rounded_weight(i.nf4, i.x.dtype)
        return contender(lambda x: F.linear(x, w), w.nbytes)

    def bitsandbytes() -> Contender:
        layer = bnb_linear(i.nf4, None, i.x.dtype)
        return contender(layer, i.nf4.nbytes)

    makers = {**ours(plan, lora_ops), "dense": dense, "bitsandbytes": bitsandbytes}
    c = i.case
    return Comparison("nf4_linear_dx", "", c.m, c.n, c.k, 2.0 * c.m * c.n * c.k, "dense", makers)
