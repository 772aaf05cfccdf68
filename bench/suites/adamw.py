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
from lora_ops.optim import AdamW, optimizer_memory

LR = 1e-3
CHECKED_STEPS = 3


def step(plan: Plan) -> Iterator[Comparison]:
    """Every number of bits; without pages, with all of them in memory, and with a quarter of them."""
    for n, k in plan.shapes:
        sizes = [n * k, n]
        for bits in (32, 8):
            memory = optimizer_memory(sizes, state_bits=bits)
            for pages, budget in (
                ("", None),
                (", pages", max(2 * memory.states, 128 << 10)),
                (", a quarter paged in", max(memory.states // 4, 128 << 10)),
            ):
                yield _step(plan, n, k, bits, budget, f"{bits}-bit, {memory.states / sum(sizes):.2f} B/param{pages}")


def _step(plan: Plan, n: int, k: int, bits: int, budget: int | None, variant: str) -> Comparison:
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=g) * 0.02 for size in ((n, k), (n,))]
    grads = [torch.randn(p.shape, generator=g) * 1e-3 for p in start]

    def contender(make: Callable[[list[Tensor]], Any], state_bits: int) -> Contender:
        params = [torch.nn.Parameter(p.to(plan.device, copy=True)) for p in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(plan.device)
        optimizer = make(params)
        states = optimizer_memory(params, state_bits=state_bits).states
        moved = sum(3 * p.nbytes for p in params) + 2 * states

        def check() -> str | None:
            for _ in range(CHECKED_STEPS):
                optimizer.step()
            return _wrong(params, start, grads, state_bits)

        return Contender(optimizer.step, check, moved)

    def lora_ops() -> Contender:
        return contender(lambda ps: AdamW(ps, LR, weight_decay=0.0, state_bits=bits, page_budget=budget), bits)

    def fused() -> Contender:
        return contender(lambda ps: torch.optim.AdamW(ps, LR, weight_decay=0.0, fused=True), 32)

    def bitsandbytes() -> Contender:
        optim = load("bitsandbytes").optim
        return contender(lambda ps: optim.AdamW8bit(ps, LR, weight_decay=0.0), 8)

    makers: dict[str, Callable[[], Contender]] = {**ours(plan, lora_ops), "torch fused 32-bit": fused}
    if bits == 8 and budget is None:
        makers["bitsandbytes AdamW8bit"] = bitsandbytes
    return Comparison("adamw", variant, 0, n, k, 0.0, "torch fused 32-bit", makers)


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
