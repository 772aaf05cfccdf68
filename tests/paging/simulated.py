"""A simulated CUDA device for `PinnedTier`: CPU tensors are its memory, streams run late, in any order events allow.

Nothing that is enqueued runs at once. An adversary chooses how much runs while the host goes on, and which stream runs
next; a copy takes place in two halves, between which others may run. Only waits for events constrain it, as on a GPU.
So a missing wait shows as wrong values in some order. Beside that, every access to device and pinned memory is checked
to be ordered after those that it conflicts with (by vector clocks), which shows a missing wait in every order.

Inside `with device:` torch functions on device memory are enqueued on the current stream, and those that would read it
on the host, without one of the calls that wait on CUDA, raise. It needs no hypothesis: bench.gpu's dry run uses it too.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]
ACTORS = ("compute", "read", "write", "worker", "backward")  # the tier makes its stream for reads first
# What neither reads nor writes a tensor's values.
METADATA = {
    "__get__", "__getitem__", "view", "detach", "reshape", "split", "numel", "size", "stride", "dim", "__len__",
    "is_contiguous", "contiguous", "data_ptr", "element_size", "untyped_storage", "__hash__", "__set__",
}  # fmt: skip


class DeadlockError(AssertionError):
    """The host waits for what nothing will ever do."""


@dataclass
class Adversary:
    """Decides what runs when.

    Attributes:
        seed: of all that is random here.
        order: who runs first of those that can.
        loyalty: how often that order is kept, from 0 to 1.
        eagerness: how much runs while the host goes on; 0: only what the host waits for.
    """

    seed: int = 0
    order: Sequence[str] = ACTORS
    loyalty: float = 0.0
    eagerness: float = 0.5

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def runs_more(self) -> bool:
        return self._random.random() < self.eagerness

    def pick(self, able: Sequence[str]) -> str:
        if self._random.random() < self.loyalty:
            return min(able, key=self.order.index)
        return self._random.choice(able)


def adversaries() -> Any:
    """Hypothesis' strategy for them."""
    from hypothesis import strategies as st

    return st.builds(
        Adversary,
        seed=st.integers(0, 2**32),
        order=st.permutations(ACTORS),
        loyalty=st.sampled_from((0.0, 0.8, 1.0)),
        eagerness=st.sampled_from((0.0, 0.5, 0.9)),
    )


@dataclass(eq=False)
class Event:
    """As CUDA's; `role` is that of the stream it was recorded on."""

    device: SimulatedDevice
    role: str
    clock: Clock
    happened: bool = False

    def query(self) -> bool:
        self.device.drift()
        if self.happened:
            self.device.learn(self.clock)
        return self.happened

    def synchronize(self) -> None:
        if not self.device.ignores(self.device.host, self.role):
            self.device.wait_for(lambda: self.happened)
            self.device.learn(self.clock)


@dataclass(eq=False)
class Stream:
    """Work in order. An entry runs something, or waits for an event."""

    role: str
    work: deque[Callable[[], None] | Event] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)

    def able(self) -> bool:
        return bool(self.work) and (not isinstance(self.work[0], Event) or self.work[0].happened)


@dataclass
class Accesses:
    """Who used a piece of memory: the last write, and the reads since, as (actor, its clock's tick)."""

    write: tuple[str, int] | None = None
    reads: list[tuple[str, int]] = field(default_factory=list)


class SimulatedDevice:
    """Implements `lora_ops.paging.tiers.cuda.Device`.

    Args:
        adversary: decides what runs when.
        budget: bytes of all frames; more is an error.
        host_budget: bytes of all pinned memory; more is an error.
        unheeded: pairs (who waits, whose event) of waits that do nothing: the faults that tests must find.

    Attributes:
        unordered: accesses to the same memory between which nothing made the later one wait.
        heeded: pairs of all waits that did something. host_waits: how often the host was blocked.
    """

    name = "cuda"

    def __init__(
        self,
        adversary: Adversary,
        *,
        budget: int,
        host_budget: int | None = None,
        unheeded: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.adversary = adversary
        self.budget, self.host_budget = budget, host_budget
        self.host = "host"  # or "worker", while one of its jobs runs
        self.host_waits = 0
        self.unordered: list[str] = []
        self.heeded: set[tuple[str, str]] = set()
        self.frames: list[Tensor] = []
        self.pinned: list[Tensor] = []
        self._unheeded = frozenset(unheeded)
        self._streams: list[Stream] = [Stream("compute")]
        self._current = [self._streams[0]]
        self._jobs: deque[_Job] = deque()
        self._clocks: dict[str, Clock] = {"host": {}, "worker": {}}
        self._owned: dict[int, Tensor] = {}  # kept: an address must not be given out again
        self._accesses: dict[tuple[int, int], Accesses] = {}
        self._running = False
        self._mode = _OnDevice(self)

    # What the tier asks for.

    def new_stream(self, role: str | None = None) -> Stream:
        self._streams.append(Stream(role or ACTORS[len(self._streams)]))
        return self._streams[-1]

    def current_stream(self) -> Stream:
        return self._current[-1]

    def record(self, stream: Stream) -> Event:
        self._tick(stream)
        event = Event(self, stream.role, dict(stream.clock))

        def happen() -> None:
            event.happened = True

        self._enqueue(stream, happen)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        if self.ignores(stream.role, event.role):
            return
        _merge(stream.clock, event.clock)
        self._enqueue(stream, event)

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        assert target.nbytes == source.nbytes
        assert len({t.untyped_storage().data_ptr() in self._owned for t in (target, source)}) == 2
        self._halves(stream, target, lambda part: part(target).copy_(part(source)), source)

    def zero(self, stream: Stream, target: Tensor) -> None:
        self._halves(stream, target, lambda part: part(target).zero_())

    def new_frame(self, nbytes: int) -> Tensor:
        frame = self.adopt(torch.full((nbytes,), 0xCD, dtype=torch.uint8))
        self.frames.append(frame)
        taken = sum(t.nbytes for t in self.frames)
        assert taken <= self.budget, f"frames take {taken} bytes of {self.budget}"
        self.zero(self.current_stream(), frame)
        return frame

    def pin(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes,), 0xAB, dtype=torch.uint8)
        self.pinned.append(memory)
        taken = sum(t.nbytes for t in self.pinned)
        assert self.host_budget is None or taken <= self.host_budget, f"{taken} bytes are pinned of {self.host_budget}"
        return memory

    def unpin(self, memory: Tensor) -> None:
        self.check_unused(memory)
        self.pinned = [t for t in self.pinned if t is not memory]

    # What tests ask for.

    def adopt(self, t: Tensor) -> Tensor:
        """Take a tensor for device memory."""
        self._owned[t.untyped_storage().data_ptr()] = t
        return t

    def owns(self, t: Any) -> bool:
        return isinstance(t, Tensor) and t.numel() > 0 and t.untyped_storage().data_ptr() in self._owned

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """As torch.cuda.stream."""
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def synchronize(self) -> None:
        """As torch.cuda.synchronize."""
        self.wait_for(lambda: not any(stream.work for stream in self._streams))
        for stream in self._streams:
            self.learn(stream.clock)

    def mend(self) -> None:
        """Heed every wait from now on, so that a test that has failed can still be cleared away."""
        self._unheeded = frozenset()
        self.synchronize()

    def check_unused(self, memory: Tensor) -> None:
        """Note if the host does not know that all work on some memory is done."""
        self._access(self._clocks[self.host], self.host, memory, write=True)

    def __enter__(self) -> SimulatedDevice:
        self._mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._mode.__exit__(*exc)

    # How it works.

    def ignores(self, waiter: str, recorder: str) -> bool:
        if (waiter, recorder) in self._unheeded:
            return True
        self.heeded.add((waiter, recorder))
        return False

    def drift(self) -> None:
        """Time passes."""
        while not self._running and self.adversary.runs_more() and self._run_one():
            pass

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Block the host."""
        self.host_waits += 1
        while not happened():
            if not self._run_one():
                raise DeadlockError(f"{self.host} waits, and nothing can run: {[s for s in self._streams if s.work]}")

    def learn(self, clock: Clock) -> None:
        """The host knows now that something is done."""
        _merge(self._clocks[self.host], clock)

    def compute(self, run: Callable[[], object], touched: Sequence[Tensor]) -> None:
        """Enqueue work on the current stream that may change some tensors."""
        stream = self.current_stream()
        self._tick(stream)
        for t in touched:
            self._access(stream.clock, stream.role, t, write=True)
        self._enqueue(stream, run)

    def finish(self, stream: Stream) -> None:
        """Block the host until a stream's work is done."""
        event = self.record(stream)
        self.wait_for(lambda: event.happened)
        self.learn(event.clock)

    def submit(self, job: _Job) -> None:
        job.clock = dict(self._clocks[self.host])
        self._jobs.append(job)
        self.drift()

    def _run_one(self) -> bool:
        able = {stream.role: stream for stream in self._streams if stream.able()}
        names = list(able)
        if self._jobs and self.host != "worker":
            names.append("worker")
        if not names:
            return False
        chosen = self.adversary.pick(names)
        if chosen == "worker":
            self._run_job(self._jobs.popleft())
            return True
        entry = able[chosen].work.popleft()
        if not isinstance(entry, Event):
            self._running = True
            try:
                entry()
            finally:
                self._running = False
        return True

    def _run_job(self, job: _Job) -> None:
        before, self.host = self.host, "worker"
        try:
            self.learn(job.clock)
            with self._mode:  # of which this may have been called inside
                job.run()
            job.clock = dict(self._clocks["worker"])
        finally:
            self.host = before

    def _enqueue(self, stream: Stream, entry: Callable[[], object] | Event) -> None:
        stream.work.append(entry)  # type: ignore[arg-type]
        self.drift()

    def _tick(self, stream: Stream) -> None:
        _merge(stream.clock, self._clocks[self.host])  # work comes after what the host had waited for
        stream.clock[stream.role] = stream.clock.get(stream.role, 0) + 1

    def _halves(
        self, stream: Stream, target: Tensor, run: Callable[[Callable[[Tensor], Tensor]], object], *read: Tensor
    ) -> None:
        self._tick(stream)
        self._access(stream.clock, stream.role, target, write=True)
        for t in read:
            self._access(stream.clock, stream.role, t, write=False)
        middle = target.numel() // 2
        for part in (slice(None, middle), slice(middle, None)):
            self._enqueue(stream, functools.partial(run, lambda t, part=part: t[part]))

    def _access(self, clock: Clock, actor: str, t: Tensor, *, write: bool) -> None:
        base = t.untyped_storage().data_ptr()
        first = t.data_ptr() - base
        pages = range(first // 4096, (first + max(1, t.nbytes) - 1) // 4096 + 1)
        tick = clock.get(actor, 0)
        for page in pages:
            seen = self._accesses.setdefault((base, page), Accesses())
            earlier = ([seen.write] if seen.write else []) + (seen.reads if write else [])
            for other, when in earlier:
                if clock.get(other, 0) < when:
                    self.unordered.append(f"{actor} does not wait for what {other} does with the same memory")
            if write:
                seen.write, seen.reads = (actor, tick), []
            else:
                seen.reads.append((actor, tick))

    def host_access(self, t: Tensor) -> None:
        """The host reads or writes pinned memory."""
        clock = self._clocks[self.host]
        clock[self.host] = clock.get(self.host, 0) + 1
        self._access(clock, self.host, t, write=True)


def _merge(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


class _OnDevice(TorchFunctionMode):
    """Enqueues what touches device memory."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device, name = self.device, getattr(func, "__name__", str(func))
        if device._running or name in METADATA:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        touched = [t for t in tensors if device.owns(t)]
        if not touched:
            if name == "numpy":
                storage = args[0].untyped_storage().data_ptr()
                if any(storage == t.untyped_storage().data_ptr() for t in device.pinned):
                    device.host_access(args[0])
            return func(*args, **kwargs)
        call = functools.partial(func, *args, **kwargs)
        if name == "adamw_":
            device.compute(call, touched)
            return None
        if name == "cpu":
            found: list[Tensor] = []
            device.compute(lambda: found.append(args[0].clone()), touched)
            device.finish(device.current_stream())
            return found[0]
        if name == "copy_" and len(touched) == 1:  # with pageable memory: the host waits
            device.compute(call, touched)
            device.finish(device.current_stream())
            return args[0]
        if name.endswith("_") and not name.startswith("_") and device.owns(args[0]):
            device.compute(call, touched)
            return args[0]
        raise AssertionError(f"{name} would read device memory on the host, and does not wait for it")


@dataclass(eq=False)
class _Job:
    """A call on the simulated thread, and its future."""

    device: SimulatedDevice
    call: Callable[[], Any]
    clock: Clock = field(default_factory=dict)
    finished: bool = False
    value: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:  # a future keeps whatever it was
            self.error = error
        self.finished = True

    def done(self) -> bool:
        self.device.drift()
        return self.finished

    def exception(self) -> BaseException | None:
        if not self.device.ignores(self.device.host, "worker"):
            self._finish()
        return self.error

    def result(self) -> Any:
        self._finish()
        if self.error:
            raise self.error
        return self.value

    def _finish(self) -> None:
        if not self.finished:
            self.device.wait_for(lambda: self.finished)
        self.device.learn(self.clock)


class SimulatedWorker:
    """A ThreadPoolExecutor of one thread, which runs when the adversary says."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device

    def submit(self, fn: Callable[..., Any], *args: Any) -> _Job:
        job = _Job(self.device, functools.partial(fn, *args))
        self.device.submit(job)
        return job

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        jobs = self.device._jobs
        if cancel_futures:
            jobs.clear()
        self.device.wait_for(lambda: not jobs)
        self.device.learn(self.device._clocks["worker"])
