"""y = x Wᵀ and dX over an NF4 weight, against dense torch on the rounded weight, bitsandbytes and torchao."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Comparison, Contender, Unavailable
from bench.peers import bnb_linear, load, torchao_nf4
from bench.plan import Plan
from bench.suites.common import Judge, by_tokens, no_grad, ours, tensor_bytes
from lora_ops.functional import nf4_linear
from tests.cases import LinearCase, LinearInputs, rounded_weight


def _inputs(plan: Plan) -> Iterator[LinearInputs]:
    for n, k in plan.shapes:
        yield from by_tokens(LinearCase(0, n, k, dtype=plan.dtype), plan.tokens, plan.device)


def forward(plan: Plan) -> Iterator[Comparison]:
    """The forward without autograd."""
    for inputs in _inputs(plan):
        yield compare_forward(plan, inputs)


def compare_forward(plan: Plan, i: LinearInputs) -> Comparison:
    """Contenders for y over these operands."""
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
        if "ATEN_CPU_CAPABILITY" in os.environ:
            raise Unavailable(
                "its eval mode has AVX-512 kernels of its own, which nothing keeps to another instruction set"
            )
        if i.x.dtype != torch.bfloat16 or i.case.n % 32 or i.case.k % 64:
            raise Unavailable("eval mode on the CPU needs bfloat16, N % 32 = 0 and K % 64 = 0")
        layer = bnb_linear(i.nf4, None, i.x.dtype).eval()
        return contender(lambda: layer(i.x), i.nf4.nbytes)

    def torchao() -> Contender:
        q, own = _torchao(i)
        run = no_grad(lambda: F.linear(i.x, q))
        return Contender(run, lambda: own.wrong({"y": run()}), i.nf4.nbytes + tensor_bytes(i.x, i.dy))

    makers = {
        **ours(plan, lora_ops),
        "dense": dense,
        "bitsandbytes": bitsandbytes,
        "bitsandbytes eval": bitsandbytes_eval,
        "torchao": torchao,
    }
    c = i.case
    return Comparison("nf4_linear", "", c.m, c.n, c.k, 2.0 * c.m * c.n * c.k, "dense", makers)


def _torchao(i: LinearInputs) -> tuple[Tensor, Judge]:
    """torchao's tensor of the same weight, and a judge that takes the values which that tensor holds for the truth."""
    q = torchao_nf4(rounded_weight(i.nf4, i.x.dtype))
    return q, Judge(replace(i, weight=q.get_original_weight()))


def _repacks() -> bool:
    return bool(load("bitsandbytes").functional.has_avx512bf16())


def dx(plan: Plan) -> Iterator[Comparison]:
    """The backward alone, through autograd: the graph of one forward is kept."""
    for inputs in _inputs(plan):
        yield compare_dx(plan, inputs)


def compare_dx(plan: Plan, i: LinearInputs) -> Comparison:
    """Contenders for dX over these operands."""
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

    def torchao() -> Contender:
        q, own = _torchao(i)
        theirs = contender(lambda x: F.linear(x, q), i.nf4.nbytes)
        return replace(theirs, check=lambda: own.wrong({"dx": theirs.run()}))

    makers = {**ours(plan, lora_ops), "dense": dense, "bitsandbytes": bitsandbytes, "torchao": torchao}
    c = i.case
    return Comparison("nf4_linear_dx", "", c.m, c.n, c.k, 2.0 * c.m * c.n * c.k, "dense", makers)
