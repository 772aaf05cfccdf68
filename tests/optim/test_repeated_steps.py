"""Steps that repeat the last one go to the kernel without work for each tensor: the same bits, whatever changes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops.optim import AdamW
from lora_ops.runtime import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"needs the native library: {native.BUILD_HINT}")
SHAPES = ((70, 80), (5000,), (3,), (0, 4), (64, 64))


def grads(step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g) for shape in SHAPES]


def is_laid_out(optimizer: AdamW) -> bool:
    """Whether the last step was one of slices that were laid out for the native kernel."""
    return optimizer._plan is not None and optimizer._plan._table is not None


class Twins:
    """The same parameters under two optimizers: one steps as it likes, the other under a trace, tensor by tensor."""

    def __init__(self, pages: dict[str, int] | None = None, **kwargs: int) -> None:
        start = grads(1000)
        self.params = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
        groups = [[{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1, "weight_decay": 0.0}] for ps in self.params]
        self.fast, self.slow = AdamW(groups[0], lr=1e-2, **kwargs, **pages or {}), AdamW(groups[1], lr=1e-2, **kwargs)
        self.steps = 0

    def step(self, missing: int | None = None, transposed: bool = False, backend: str = "auto") -> bool:
        """One step of both; whether the plan of the first one's last step served again."""
        self.steps += 1
        for params in self.params:
            for i, (p, grad) in enumerate(zip(params, grads(self.steps), strict=True)):
                p.grad = None if i == missing else grad
            if transposed:
                params[4].grad = grads(self.steps)[4].t()
        plan = self.fast._plan
        with lora_ops.use_backend(backend):
            self.fast.step()
        with lora_ops.trace() as trace:
            self.slow.step()
        assert trace.backends("adamw_") == {"native"}
        self.same()
        assert plan is None or (self.fast._plan is plan) == is_laid_out(self.fast)
        return self.fast._plan is plan

    def same(self) -> None:
        for a, b in zip(*self.params, strict=True):
            assert torch.equal(a, b)
        states = [o.state_dict()["state"] for o in (self.fast, self.slow)]
        for i, state in states[1].items():
            for name, t in state.items():
                assert torch.equal(states[0][i][name], t), (i, name)


PAGES = {
    "no pages": None,
    "resident": {"page_budget": 1 << 20, "extent_bytes": 16 << 10},
    "streamed": {"page_budget": 12 << 10, "extent_bytes": 4096},
}


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES.keys())
@pytest.mark.parametrize("bits", [32, 8])
def test_a_repeated_step_gives_the_same_bits(bits: int, pages: dict[str, int] | None) -> None:
    """With pages the tables follow the frames, which move from extent to extent."""
    twins = Twins(state_bits=bits, pages=pages)
    assert [twins.step() for _ in range(6)] == [False, True, True, True, True, True]
    for optimizer in (twins.fast, twins.slow):
        optimizer.param_groups[0]["lr"] = 0.03
        optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    assert twins.step()
    if pages:
        stats = twins.fast.paging_stats()
        assert (stats.misses > 8 * stats.extents // 2) == (stats.extents * stats.extent_bytes > stats.budget)
        twins.fast.close()


def test_streamed_pages_keep_the_bits_of_stochastic_rounding() -> None:
    """Laid out, with states in 8 and in 32 bits."""
    results = []
    for pages in ({}, {"page_budget": 12 << 10, "extent_bytes": 4096}):
        params = [nn.Parameter(p.bfloat16()) for p in grads(1000)]
        optimizer = AdamW(params, state_bits=8, stochastic_rounding=True, seed=3, **pages)
        for number in range(6):
            for p, grad in zip(params, grads(number), strict=True):
                p.grad = grad.bfloat16()
            optimizer.step()
        assert is_laid_out(optimizer)
        optimizer.close()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("frames", [2, 3, 7])
def test_threads_that_stream_do_not_change_bits(frames: int, threads: int) -> None:
    """Which thread takes which extent, and in which frame, is left to chance."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for bits in (32, 8):
            pages = {"page_budget": frames * 4096, "extent_bytes": 4096}
            twins = Twins(pages, state_bits=bits)
            assert [twins.step() for _ in range(12)] == [False, *[True] * 11]
            stats = twins.fast.paging_stats()
            assert stats.peak <= stats.budget
            # All but what is in frames moves both ways in each step, and that is the least that has to.
            read, written = stats.read, stats.written
            assert twins.fast.step() is None
            stats = twins.fast.paging_stats()
            missing = (stats.extents - min(frames, stats.extents)) * 4096
            assert (stats.read - read, stats.written - written) == (missing, missing)
            twins.fast.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES.keys())
def test_what_needs_a_new_plan(pages: dict[str, int] | None) -> None:
    """A gradient that is missing or strided, storage or size that changes, groups that grow, a loaded state."""
    twins = Twins(pages)

    def settle() -> None:
        for _ in range(2):
            twins.step()
        assert twins.step()

    settle()
    assert not twins.step(missing=1)
    assert [twins.step() for _ in range(4)] == [False, True, True, True]  # parameter 1 is a step behind from now on
    twins = Twins(pages)
    settle()
    assert not twins.step(transposed=True)
    settle()
    for params in twins.params:
        params[0].data = params[0].data.clone()
    assert not twins.step()
    settle()
    for params in twins.params:
        params[4].data = params[4].data.t()  # at the same address
    assert not twins.step()
    twins = Twins(pages)
    settle()
    for params, optimizer in zip(twins.params, (twins.fast, twins.slow), strict=True):
        del optimizer.state[params[1]]
    assert not twins.step()
    twins = Twins(pages)
    settle()
    for optimizer in (twins.fast, twins.slow):
        optimizer.load_state_dict(optimizer.state_dict())
    assert not twins.step()
    settle()
    for optimizer in (twins.fast, twins.slow):
        p = nn.Parameter(torch.ones(7))
        p.grad = torch.ones(7)
        optimizer.add_param_group({"params": [p]})
    assert not twins.step()
    assert torch.equal(*(o.param_groups[2]["params"][0] for o in (twins.fast, twins.slow)))


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES.keys())
def test_a_plan_serves_while_a_parameter_is_frozen(pages: dict[str, int] | None) -> None:
    """Its states stay, and those of the others go on without it; back in, it is behind them."""
    twins = Twins(pages, state_bits=8)
    assert [twins.step() for _ in range(2)] == [False, True]
    assert [twins.step(missing=0) for _ in range(3)] == [False, True, True]
    assert [twins.step() for _ in range(3)] == [False, True, True]
    steps = [twins.fast.state[p]["step"] for p in twins.params[0]]
    assert steps == [5, 8, 8, 8, 8]


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES.keys())
def test_a_plan_serves_on_another_backend(pages: dict[str, int] | None) -> None:
    twins = Twins(pages)
    steps = [twins.step(backend=backend) for backend in ("native", "native", "reference", "auto", "reference")]
    assert steps == [False, True, True, True, True]


@pytest.mark.parametrize("fits", [True, False])
def test_a_parameter_that_shrinks_in_place_needs_a_new_plan(fits: bool) -> None:
    """Its address stays: the laid-out step would go beyond the end of the gradient, or of the parameter alone."""
    storage = torch.arange(10_000.0)
    p = nn.Parameter(storage)
    optimizer = AdamW([p])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert is_laid_out(optimizer)
    rest = storage[5000:].clone()
    p.grad = None if fits else torch.ones_like(p)
    p.data = storage[:5000]
    if fits:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="expected 5000 elements, got 10000"):
        optimizer.step()
    assert torch.equal(storage[5000:], rest)


def test_a_gradient_of_another_size_or_dtype_needs_a_new_plan() -> None:
    p = nn.Parameter(torch.arange(10_000.0))
    optimizer = AdamW([p])
    if hasattr(p, "grad_dtype"):  # of torch 2.10
        p.grad_dtype = None
        served = []
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
            plan, p.grad = optimizer._plan, torch.ones(10_000, dtype=dtype)
            optimizer.step()
            served.append(optimizer._plan is plan)
        assert served == [False, False, True]
    whole = p.data
    p.grad = torch.ones(10_000)
    optimizer.step()
    optimizer.step()
    p.grad, p.data = None, whole[:5000]
    p.grad, p.data = torch.ones(5000), whole
    with pytest.raises(ValueError, match="grad: expected 10000 elements, got 5000"):
        optimizer.step()


def test_a_plan_of_a_group_that_was_taken_out_and_put_back() -> None:
    """Saving in between has forgotten its states."""
    for pages in PAGES.values():
        twins = Twins(pages)
        assert [twins.step() for _ in range(2)] == [False, True]
        for optimizer in (twins.fast, twins.slow):
            group = optimizer.param_groups.pop()
            optimizer.state_dict()
            optimizer.param_groups.append(group)
        assert not twins.step()
        assert twins.step()


def test_a_plan_follows_its_extents_into_frames_and_out_of_them() -> None:
    """Which hold a part of all: saving moves the others in."""
    twins = Twins({"page_budget": 12 << 10, "extent_bytes": 4096})
    twins.step()
    moved = []
    for number in range(8):
        for params in twins.params:
            for p in params:
                p.grad = None
            params[2].grad = grads(number)[2]
        misses = twins.fast.paging_stats().misses
        twins.fast.step()
        twins.slow.step()
        moved.append(twins.fast.paging_stats().misses > misses)
        if number % 4 == 3:
            twins.same()
    assert moved == [True, False, False, False] * 2
    assert is_laid_out(twins.fast)


def test_gradients_are_not_kept_alive() -> None:
    twins = Twins()
    for _ in range(3):
        twins.step()
    p = twins.params[0][0]
    assert p.grad is not None
    grad = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert grad() is None


def test_backward_sees_the_parameter_change() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    for _ in range(3):
        p.grad = torch.ones(3)
        loss = (p * p).sum()
        optimizer.step()
    assert is_laid_out(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
