"""Paged AdamW on the GPU: races provoked by delays, waits of the host looked for, and times.

Twice oversubscribed, a step is compared with bare copies of as many bytes between pinned memory and the device, both
ways at once, and with bitsandbytes' paged optimizer while other memory leaves the same room for its states on the
device. All results are compared with AdamW without pages, bit for bit where they are ours.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.clocks import StepClock
from bench.device.aims import FITS, OVERSUBSCRIBED
from bench.device.context import Context
from bench.environment import exception_line
from bench.measure import OURS, Comparison, Contender, measure, one_line
from bench.peers import load
from bench.plan import Effort
from lora_ops.optim import AdamW, optimizer_memory
from lora_ops.paging.tiers import CudaDevice, Device

LR = 1e-3
STEPS = 3  # that results are compared after
EFFORT = Effort(min_rounds=4, max_rounds=20, seconds=2.0, warmup=1)
ROOM = 512 << 20  # what bitsandbytes needs on the device besides its states
SLEEP = 2_000_000  # cycles, a millisecond: longer than any transfer or kernel of the checks takes
BLOCKING = ("cudaMemcpy", "hipMemcpy", "cudaFree", "hipFree", "cudaMalloc", "hipMalloc")
LATE = ("nothing", "gradients", "kernels", "reads", "write-backs")


@dataclass(frozen=True)
class Size:
    """Parameters of `numel` elements each, all float32."""

    tensors: int
    numel: int
    extent_bytes: int | None = None

    @property
    def numels(self) -> list[int]:
        return [self.numel] * self.tensors


CHECKED, TIMED = Size(4, 1 << 20, 256 << 10), Size(16, 1 << 24)
DRY = Size(3, 20_000, 64 << 10)


class Delayed(CudaDevice):
    """A device on which transfers of one direction begin late."""

    def __init__(self, device: torch.device, late: str) -> None:
        super().__init__(device)
        self._late, self._streams = late, []  # type: ignore[var-annotated]

    def new_stream(self) -> torch.cuda.Stream:
        self._streams.append(super().new_stream())
        return self._streams[-1]

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        if self._late == ("write-backs" if source.is_cuda else "reads"):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP)
        super().copy(stream, target, source)


class DelayedAdamW(AdamW):
    """AdamW whose pages are on such a device."""

    def __init__(self, params: Any, late: str, **kwargs: Any) -> None:
        self.late = late
        super().__init__(params, **kwargs)

    def _device_of_frames(self, device: torch.device) -> Device | None:
        return None if device.type == "cpu" else Delayed(device, self.late)


class Workload:
    """Parameters and gradients, the same for all who step."""

    def __init__(self, device: str, size: Size, bits: int) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(n, generator=generator, device=device) * scale for n in size.numels]

        self.device, self.size, self.bits = device, size, bits
        self.start, self.grads = draw(0.02), draw(1e-3)
        self.states = optimizer_memory(size.numels, state_bits=bits).states

    @property
    def options(self) -> dict[str, Any]:
        return {"lr": LR, "weight_decay": 0.0, "state_bits": self.bits}

    def pages(self, part: float) -> dict[str, Any]:
        """Options for a budget of a part of the states."""
        extent = self.size.extent_bytes
        budget = max(int(self.states * part), 2 * (extent or 64 << 10))
        return {**self.options, "page_budget": budget, "extent_bytes": extent}

    def params(self) -> list[torch.nn.Parameter]:
        """Fresh parameters, with the gradients."""
        params = [torch.nn.Parameter(t.clone()) for t in self.start]
        for p, grad in zip(params, self.grads, strict=True):
            p.grad = grad
        return params

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        """The parameters after STEPS steps without pages."""
        params = self.params()
        optimizer = AdamW(params, **self.options)
        for _ in range(STEPS):
            optimizer.step()
        return [p.detach() for p in params]

    def differs(self, params: list[torch.nn.Parameter]) -> str | None:
        """In how many values parameters differ from what is expected, or None."""
        differ = sum(int((p.detach() != e).sum()) for p, e in zip(params, self.expected, strict=True))
        return f"{differ} of {sum(self.size.numels)} parameters differ from those without pages" if differ else None

    def is_off(self, params: list[torch.nn.Parameter]) -> str | None:
        """Whether parameters of another implementation are too far off, in parts of the way that they went."""
        limit = 1e-3 if self.bits == 32 else 0.03  # as in bench/suites/adamw.py, and as much again for our own error
        for p, e in zip(params, self.expected, strict=True):
            off = float((p.detach() - e).abs().mean()) / (STEPS * LR)
            if not off <= limit:
                return f"parameters are off by {off:.2g} of the way they went, at most {limit} is right"
        return None


def wrong_race(late: str, bits: int, file: bool, device: str, size: Size) -> str | None:
    """Why steps with something late differ from steps without pages, or None."""
    work = Workload(device, size, bits)
    cuda = device == "cuda"
    host = {"host_budget": work.states // 2} if file and cuda else {}
    params = work.params()
    optimizer = DelayedAdamW(params, late, **work.pages(0.25), **host)
    try:
        for _ in range(STEPS):
            if cuda and late == "gradients":
                _late_gradients(params, work.grads)
            if cuda and late == "kernels":
                torch.cuda._sleep(20 * SLEEP)
            optimizer.step()
        return work.differs(params)
    finally:
        optimizer.close()


def _late_gradients(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    """Gradients that another stream writes late, over NaN; the current stream waits for it, as after `backward`."""
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        torch.cuda._sleep(20 * SLEEP)
        for p, grad in zip(params, grads, strict=True):
            if p.grad is not None:
                p.grad.copy_(grad)
                p.grad.record_stream(side)
    current.wait_stream(side)


def waits_of_the_host(device: str, size: Size) -> tuple[str, str]:
    """Status and reason: which calls of the runtime in a step block the host, as torch's profiler sees them."""
    work = Workload(device, size, 32)
    optimizer = AdamW(work.params(), **work.pages(0.5))
    try:
        for _ in range(2):  # compiles, pins and allocates
            optimizer.step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            torch.cuda.synchronize()
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(STEPS):
                with torch.profiler.record_function("paged step"):
                    optimizer.step()
        return judge_calls([(e.name, e.time_range.start, e.time_range.end) for e in profile.events()], device)
    finally:
        optimizer.close()


def judge_calls(events: list[tuple[str, float, float]], device: str) -> tuple[str, str]:
    """Judge the events of a profile, (name, start, end): those within a "paged step" count."""
    steps = [(start, end) for name, start, end in events if name == "paged step"]
    within = [name for name, t, _ in events if any(start <= t <= end for start, end in steps)]
    calls = [name for name in within if name.startswith(("cuda", "hip"))]
    if device == "cuda" and not any("MemcpyAsync" in name for name in calls):
        return "declined", "the profiler shows no calls of the runtime"
    blocking = sorted({name for name in calls if "Synchronize" in name or name in BLOCKING})
    return ("wrong", f"the host waits in {', '.join(blocking)}") if blocking else ("ok", "")


def copies(work: Workload, read: int, written: int, extent: int) -> Callable[[], None]:
    """Bare copies of as many bytes as a step moves, both ways at once, in extents."""
    cuda = work.device == "cuda"
    make = functools.partial(torch.empty, extent, dtype=torch.uint8)
    rings = [[(make(device=work.device), make(pin_memory=cuda)) for _ in range(8)] for _ in range(2)]

    sides = [torch.cuda.Stream() if cuda else None for _ in rings]

    def run() -> None:
        for inbound, side, ring, n in zip((True, False), sides, rings, (read, written), strict=True):
            if side is not None:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # of None: nothing
                for i in range(n // extent):
                    device, host = ring[i % len(ring)]
                    target, source = (device, host) if inbound else (host, device)
                    target.copy_(source, non_blocking=True)

    return run


def oversubscribed(work: Workload) -> Comparison:
    """States of twice the budget: ours, bare copies and bitsandbytes."""
    half = work.pages(0.5)

    def ours() -> tuple[list[torch.nn.Parameter], AdamW]:
        params = work.params()
        return params, AdamW(params, **half)

    def lora_ops() -> Contender:
        params, optimizer = ours()
        return Contender(optimizer.step, functools.partial(_check, work, params, optimizer, work.differs), 0)

    def pinned_copies() -> Contender:
        _, optimizer = ours()
        for _ in range(STEPS):
            optimizer.step()
        before = optimizer.paging_stats()
        optimizer.step()
        after = optimizer.paging_stats()
        optimizer.close()
        moved = after.read - before.read, after.written - before.written
        run = copies(work, *moved, after.extent_bytes)
        return Contender(run, lambda: None, sum(moved), f"{moved[0] >> 20} MiB in, {moved[1] >> 20} MiB out")

    def bitsandbytes() -> Contender:
        optim = load("bitsandbytes").optim
        params = work.params()
        cls = optim.PagedAdamW32bit if work.bits == 32 else optim.PagedAdamW8bit
        optimizer = cls(params, LR, weight_decay=0.0)
        held = None
        if work.device == "cuda":
            work.expected  # noqa: B018 - before the memory is taken
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] - work.states // 2 - ROOM
            held = torch.empty(max(0, free), dtype=torch.uint8, device=work.device)

        def run(held: Tensor | None = held) -> None:
            optimizer.step()

        return Contender(run, functools.partial(_check, work, params, optimizer, work.is_off), 0)

    makers = {OURS: lora_ops, "pinned copies": pinned_copies, "bitsandbytes": bitsandbytes}
    return Comparison("paged_adamw", f"{work.bits}-bit, {OVERSUBSCRIBED}", 0, work.size.tensors, work.size.numel, 0.0,
                      "pinned copies", makers)  # fmt: skip


def fitting(work: Workload) -> Comparison:
    """A budget that all states fit: with pages and without."""

    def contender(**options: Any) -> Contender:
        params = work.params()
        optimizer = AdamW(params, **options)
        return Contender(optimizer.step, functools.partial(_check, work, params, optimizer, work.differs), 0)

    makers = {
        OURS: lambda: contender(**work.pages(2.0)),
        f"{OURS} without pages": lambda: contender(**work.options),
    }
    return Comparison("paged_adamw", f"{work.bits}-bit, {FITS}", 0, work.size.tensors, work.size.numel, 0.0,
                      f"{OURS} without pages", makers)  # fmt: skip


def _check(
    work: Workload, params: list[torch.nn.Parameter], optimizer: Any, judge: Callable[[Any], str | None]
) -> str | None:
    for _ in range(STEPS):
        optimizer.step()
    return judge(params)


def paging(context: Context) -> Iterator[str]:
    """Races, waits of the host, and times of AdamW's pages."""
    device = context.plan.device
    checked, timed = (DRY, DRY) if context.dry else (CHECKED, TIMED)

    def note(case: str, status: str, reason: str) -> str:
        record = {"op": "adamw_ in pages", "backend": "auto", "case": case, "status": status, "reason": reason}
        context.run.checks.append(record | {"captured": False})
        return f"{case}: {status} {reason}"

    for bits, late, file in itertools.product((32, 8), LATE, (False, True)):
        try:
            wrong = wrong_race(late, bits, file, device, checked)
        except Exception as error:  # a race may end in anything
            wrong = exception_line(error)
        case = f"{bits}-bit, {late} late{', a file behind' if file else ''}"
        yield note(case, "wrong" if wrong else "ok", wrong or "")
    yield note("the host waits for nothing", *waits_of_the_host(device, checked))
    clock, effort = StepClock(device), context.plan.effort if context.dry else EFFORT
    for bits in (32, 8):
        work = Workload(device, timed, bits)
        for comparison, how in ((oversubscribed(work), clock), (fitting(work), context.clock)):
            rows = measure(comparison, how, context.ceilings, effort)
            context.run.rows += rows
            yield f"{comparison.id}: {one_line(rows)}"
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
