"""A step of AdamW over a layer's weight and bias: 32- and 8-bit states, in memory and in pages, and torch's fused.

Everything is the same for every contender: parameters, gradients in float32, no weight decay, which bitsandbytes orders
differently. What a variant needs of memory stands in its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Comparison, Contender
from bench.peers import load
from bench.plan import Plan
from bench.suites.common import ours
from lora_ops.kernels.adamw import SliceTable, StepValues
from lora_ops.optim import AdamW, optimizer_memory
from lora_ops.paging.tiers import FileTier

LR = 1e-3
CHECKED_STEPS = 3
COMPUTE, TRANSFERS = "compute: without pages", "transfers: without the update"


def step(plan: Plan) -> Iterator[Comparison]:
    """Every number of bits, without pages."""
    for n, k in plan.shapes:
        for bits in (32, 8):
            memory = optimizer_memory(_sizes(n, k), state_bits=bits)
            yield _step(plan, n, k, bits, f"{bits}-bit, {memory.states / sum(_sizes(n, k)):.2f} B/param")


def pages(plan: Plan) -> Iterator[Comparison]:
    """Every number of bits, with all pages in memory and with a quarter of them.

    Ratios are over the longer of two steps measured apart: one without pages, which only computes, and one without the
    update, which only moves the same extents, by the same code on the same threads.
    """
    for n, k in plan.shapes:
        for bits in (32, 8):
            states = optimizer_memory(_sizes(n, k), state_bits=bits).states
            for what, budget in (("all in memory", 2 * states), ("a quarter in memory", states // 4)):
                yield _pages(plan, n, k, bits, max(budget, 128 << 10), f"{bits}-bit, {what}")


def _sizes(n: int, k: int) -> list[int]:
    return [n * k, n]


class _Operands:
    """The parameters of a layer and gradients for them, each time the same."""

    def __init__(self, plan: Plan, n: int, k: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.device = plan.device
        self.start = [torch.randn(size, generator=g) * 0.02 for size in ((n, k), (n,))]
        self.grads = [torch.randn(p.shape, generator=g) * 1e-3 for p in self.start]

    def contender(self, make: Callable[[list[Tensor]], Any], state_bits: int) -> Contender:
        params = [torch.nn.Parameter(p.to(self.device, copy=True)) for p in self.start]
        for p, grad in zip(params, self.grads, strict=True):
            p.grad = grad.to(self.device)
        optimizer = make(params)
        states = optimizer_memory(params, state_bits=state_bits).states
        moved = sum(3 * p.nbytes for p in params) + 2 * states

        def check() -> str | None:
            for _ in range(CHECKED_STEPS):
                optimizer.step()
            return _wrong(params, self.start, self.grads, state_bits)

        return Contender(optimizer.step, check, moved)


def _step(plan: Plan, n: int, k: int, bits: int, variant: str) -> Comparison:
    operands = _Operands(plan, n, k)

    def lora_ops() -> Contender:
        return operands.contender(lambda ps: AdamW(ps, LR, weight_decay=0.0, state_bits=bits), bits)

    def fused() -> Contender:
        return operands.contender(lambda ps: torch.optim.AdamW(ps, LR, weight_decay=0.0, fused=True), 32)

    def bitsandbytes() -> Contender:
        optim = load("bitsandbytes").optim
        return operands.contender(lambda ps: optim.AdamW8bit(ps, LR, weight_decay=0.0), 8)

    makers: dict[str, Callable[[], Contender]] = {**ours(plan, lora_ops), "torch fused 32-bit": fused}
    if bits == 8:
        makers["bitsandbytes AdamW8bit"] = bitsandbytes
    return Comparison("adamw", variant, 0, n, k, 0.0, "torch fused 32-bit", makers)


def _pages(plan: Plan, n: int, k: int, bits: int, budget: int, variant: str) -> Comparison:
    operands = _Operands(plan, n, k)

    def paged(params: list[Tensor]) -> AdamW:
        return AdamW(params, LR, weight_decay=0.0, state_bits=bits, page_budget=budget)

    def lora_ops() -> Contender:
        return operands.contender(paged, bits)

    def compute() -> Contender:
        return operands.contender(lambda ps: AdamW(ps, LR, weight_decay=0.0, state_bits=bits), bits)

    def transfers() -> Contender:
        made: list[AdamW] = []
        inner = operands.contender(lambda ps: made.append(paged(ps)) or made[0], bits)  # type: ignore[func-returns-value]
        pager = made[0]._store.pager  # type: ignore[union-attr]
        nothing, no_values = SliceTable([]), StepValues((), (), (), (), None)

        def run() -> None:
            extents = range(len(pager.table))
            moves = any(page.frame is None for page in pager.table)
            if isinstance(pager.tier, FileTier) and SliceTable.serves() and moves:
                with pager.native_pass(extents, dict.fromkeys(extents, (0, 0))) as work:
                    work.report = nothing.run_in_pages(work.pages, no_values)
                return
            for _ in pager.sweep(extents):
                pass

        states = optimizer_memory(_sizes(n, k), state_bits=bits).states
        return Contender(run, inner.check, 2 * max(0, states - budget))

    makers = {**ours(plan, lora_ops), COMPUTE: compute, TRANSFERS: transfers}
    baseline = "the longer of its compute and its transfers"
    return Comparison(
        "adamw_pages",
        variant,
        0,
        n,
        k,
        0.0,
        baseline,
        makers,
        slowest_of=(COMPUTE, TRANSFERS),
        shares_cores=plan.device == "cpu" and "quarter" in variant,
    )


def _wrong(params: list[Tensor], start: list[Tensor], grads: list[Tensor], bits: int) -> str | None:
    """Against torch.optim.AdamW in float64, in parts of a step's length."""
    truth = [torch.nn.Parameter(p.double()) for p in start]
    for p, grad in zip(truth, grads, strict=True):
        p.grad = grad.double()
    optimizer = torch.optim.AdamW(truth, LR, weight_decay=0.0)
    for _ in range(CHECKED_STEPS):
        optimizer.step()
    # Measured: 4e-6 in 32 bits, where each parameter counts; 7e-3 on average in 8, 9e-3 with bitsandbytes.
    limit = 1e-4 if bits == 32 else 0.02
    for p, exact in zip(params, truth, strict=True):
        off = (p.detach().cpu().double() - exact.detach()).abs()
        error = float(off.max() if bits == 32 else off.mean()) / (CHECKED_STEPS * LR)
        if not error <= limit:
            return f"parameters are off by {error:.2g} of the way they went, at most {limit} is right"
    return None
