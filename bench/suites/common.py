"""What the suites share: a checker with its truth computed once, and our op on each backend of the plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from bench.measure import OURS, Contender, Unavailable
from bench.plan import Plan
from lora_ops import BackendError, trace, use_backend
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime.crossovers import force
from tests.cases import LinearCase, LinearInputs, errors, run_torch, truth
from tests.tolerance import Truth

T = TypeVar("T")


class Judge:
    """Judges results of one input by tests/tolerance.py; truth and torch's own way are computed once, when needed."""

    def __init__(self, inputs: LinearInputs) -> None:
        self.inputs = inputs

    @functools.cached_property
    def _truth(self) -> dict[str, Truth]:
        return truth(self.inputs)

    @functools.cached_property
    def _own(self) -> dict[str, Tensor]:
        return run_torch(self.inputs)

    def wrong(self, got: Mapping[str, Tensor]) -> str | None:
        """Why a result is wrong, or None."""
        found = errors(self.inputs, got, exact=self._truth, own=self._own)
        return "; ".join(f"{name}: {e.wrong}" for name, e in found.items() if e.wrong) or None


def tensor_bytes(*tensors: Tensor | NF4Tensor | None) -> int:
    """Bytes of the tensors, each once."""
    return sum(t.nbytes for t in tensors if t is not None)


def ours(plan: Plan, make: Callable[[], Contender]) -> dict[str, Callable[[], Contender]]:
    """Our contender on each backend of the plan; a backend that declines is unavailable and says why."""
    return {
        OURS if backend == "auto" else f"{OURS} {backend}": functools.partial(_on_backend, backend, make)
        for backend in plan.backends
    }


def _on_backend(backend: str, make: Callable[[], Contender]) -> Contender:
    def within(fn: Callable[[], T]) -> T:
        try:
            with use_backend(backend):
                return fn()
        except BackendError as error:
            raise Unavailable(str(error)) from error

    inner = within(make)
    outer = Contender(inner.run if backend == "auto" else lambda: within(inner.run), inner.check, inner.bytes)

    def check() -> str | None:
        with trace() as record:
            wrong = within(inner.check)
        outer.note = ", ".join(sorted(record.backends()))  # what the library chose, for the report
        return wrong

    outer.check = check
    return outer


def by_tokens(case: LinearCase, tokens: Sequence[int], device: str) -> Iterator[LinearInputs]:
    """Inputs of each number of tokens over one weight, whose drawing takes longest: the first rows of the largest."""
    full = replace(case, m=max(tokens)).inputs(device)
    for m in tokens:
        yield replace(full, case=replace(full.case, m=m), x=full.x[:m], dy=full.dy[:m])


def on_route(make: Callable[[], Contender], **changes: int) -> Callable[[], Contender]:
    """Our contender with these fields of Crossovers, so that it takes the route that they lead to."""

    def within(fn: Callable[[], T]) -> T:
        with force(**changes):
            return fn()

    def contender() -> Contender:
        inner = within(functools.partial(_on_backend, "auto", make))
        outer = Contender(lambda: within(inner.run), inner.check, inner.bytes)

        def check() -> str | None:
            wrong = within(inner.check)
            outer.note = inner.note
            return wrong

        outer.check = check
        return outer

    return contender


def no_grad(fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`fn` without autograd."""

    def call() -> Tensor:
        with torch.no_grad():
            return fn()

    return call
