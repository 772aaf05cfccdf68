"""How a call is timed: wall clock on the CPU, events with a flushed cache on CUDA; contenders always take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from bench.plan import Effort

Runs = Mapping[str, Callable[[], object]]


class Clock(Protocol):
    """Times calls in turn: one round runs every contender once, in the order given."""

    def interleave(self, runs: Runs, effort: Effort) -> dict[str, list[float]]:
        """Seconds of each call, by contender."""


class CpuClock:
    """Wall time of each call. The other contenders' weights pass through the cache between two calls of one."""

    def _wait(self) -> None:
        """Nothing runs on after a call."""

    def interleave(self, runs: Runs, effort: Effort) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(effort.warmup):
            for run in runs.values():
                run()
        end = time.perf_counter() + effort.seconds
        rounds = 0
        while runs and rounds < effort.max_rounds and (rounds < effort.min_rounds or time.perf_counter() < end):
            for name, run in runs.items():
                self._wait()
                begin = time.perf_counter()
                run()
                self._wait()
                times[name].append(time.perf_counter() - begin)
            rounds += 1
        return times


class StepClock(CpuClock):
    """Wall time of whole steps, from an idle device to an idle device: what the host takes counts."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class CudaClock:
    """Time between two CUDA events. Before each call a buffer of twice the L2 is written, so that nothing is cached,
    and the GPU is kept busy while the host enqueues, so that the time is the GPU's and not the launches'.
    """

    CYCLES_PER_S = 2e9
    MAX_BUSY_S = 0.02

    def __init__(self, device: torch.device | str = "cuda") -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def interleave(self, runs: Runs, effort: Effort) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(effort.warmup):
            for run in runs.values():
                run()
        busy = {name: self._busy_cycles(run) for name, run in runs.items()}
        torch.cuda.synchronize()
        end = time.perf_counter() + effort.seconds
        rounds = 0
        while runs and rounds < effort.max_rounds and (rounds < effort.min_rounds or time.perf_counter() < end):
            for name, run in runs.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                torch.cuda._sleep(busy[name])
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(stop) / 1e3)
            rounds += 1
        return times

    def _busy_cycles(self, run: Callable[[], object]) -> int:
        """Longer than the host takes to enqueue the call, which PEFT's forward and backward does for a millisecond."""
        times = []
        for _ in range(2):  # the first may compile, and allocate
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return int(self.CYCLES_PER_S * min(1.5 * min(times) + 2e-4, self.MAX_BUSY_S))


def clock_for(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()
