"""Pages on a simulated CUDA device: the same bits in every order that its streams may run in, and no wait too few."""

from __future__ import annotations

import functools
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_ops.optim import PagingError
from lora_ops.paging.pager import Pager
from lora_ops.paging.tiers import FileTier, PinnedTier
from tests.paging.simulated import ACTORS, Adversary, SimulatedDevice, SimulatedWorker, adversaries

EXTENT = 4096


def adversary(seed: int) -> Adversary:
    """One of many: patient and hasty, faithful to an order and not."""
    order = random.Random(seed).sample(ACTORS, len(ACTORS))
    return Adversary(seed, order, (0.0, 0.8, 1.0)[seed % 3], (0.0, 0.5, 0.9)[seed // 3 % 3])


# The page layer alone: bytes that kernels add to, and read, on two streams.


class Play:
    """Passes over extents, drawn from a seed, of which the host waits for none; the truth is a byte for each extent."""

    def __init__(self, seed: int, device: SimulatedDevice, frames: int, file: Path | None, host_extents: int) -> None:
        self.random = random.Random(seed)
        self.device = device
        tier = FileTier(file, EXTENT) if file else None
        if tier:
            tier._worker = SimulatedWorker(device)  # type: ignore[assignment]
        self.pager = Pager(PinnedTier(device, EXTENT, file=tier, host_extents=host_extents), frames)
        self.model: list[int] = []
        self.seen: list[tuple[Tensor, int]] = []
        self.streams = [device.current_stream(), device.new_stream("backward")]

    def run(self, passes: int) -> None:
        self.allocate()
        for _ in range(passes):
            with self.device.on(self.random.choice(self.streams)):
                self.random.choice((self.update, self.update, self.read, self.read, self.overwrite, self.forget))()
            if self.random.random() < 0.2:
                self.allocate()

    def check(self) -> None:
        """What kernels read was right."""
        self.device.synchronize()
        for seen, byte in self.seen:
            got = seen.cpu().unique().tolist()
            assert got == [byte], f"a kernel read {got} in place of {byte}"

    def close(self) -> None:
        """All work on frames and pinned memory is done then."""
        self.pager.close()
        assert not self.device.pinned
        for frame in self.device.frames:
            self.device.check_unused(frame)

    def allocate(self) -> None:
        n = self.random.randint(3, 9)
        self.pager.allocate(n)
        self.model += [0] * n

    def some(self) -> list[int]:
        every = range(len(self.model))
        return self.random.sample(every, self.random.randint(1, len(every)))

    def update(self) -> None:
        byte, stop_after = self.random.randint(1, 255), self.random.randint(0, 20)
        for i, batch in enumerate(sweep := self.pager.sweep(self.some())):
            if i == stop_after:
                sweep.close()
                break
            for e, frame in batch:
                frame.add_(byte)
                self.model[e] = (self.model[e] + byte) % 256

    def read(self, every: bool = False) -> None:
        for batch in self.pager.sweep(range(len(self.model)) if every else self.some(), write=False):
            for e, frame in batch:
                seen = self.device.adopt(torch.empty(EXTENT, dtype=torch.uint8))
                self.device.compute(functools.partial(seen.copy_, frame), [seen, frame])
                self.seen.append((seen, self.model[e]))

    def overwrite(self) -> None:
        byte, stop_after = self.random.randint(1, 255), self.random.randint(0, 6)
        away = [e for e in self.some() if self.pager.table[e].frame is None]
        for i, batch in enumerate(sweep := self.pager.sweep(away, read=False)):
            if i == stop_after:
                sweep.close()
                break
            for e, frame in batch:
                frame.fill_(byte)
                self.model[e] = byte
                away.remove(e)
        for e in away:  # not reached; what was fetched ahead holds zeros
            if self.pager.table[e].frame is not None:
                self.model[e] = 0

    def forget(self) -> None:
        if self.random.random() < 0.3:
            self.pager.reset()
            self.model = []
            self.allocate()


@contextmanager
def folder(wanted: bool) -> Iterator[Path | None]:
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def play(
    seed: int,
    chosen: Adversary,
    *,
    file: bool,
    frames: int,
    host_extents: int,
    unheeded: Sequence[tuple[str, str]] = (),
) -> tuple[SimulatedDevice, Exception | None]:
    """A play from beginning to end: the device, and what went wrong."""
    budget = host_extents * EXTENT if file else None
    device = SimulatedDevice(chosen, budget=frames * EXTENT, host_budget=budget, unheeded=unheeded)
    with folder(file) as path, device:
        game = Play(seed, device, frames, path, host_extents)
        error = None
        try:
            game.run(passes=16)
            if seed % 3:
                game.read(every=True)
            if seed % 2:
                game.close()  # with work under way
            game.check()
        except (AssertionError, PagingError) as found:
            error = found
        device.mend()
        game.close()
    return device, error


@given(
    seed=st.integers(0, 2**32), chosen=adversaries(), file=st.booleans(), frames=st.integers(1, 10),
    host_extents=st.integers(2, 20),
)  # fmt: skip
def test_kernels_read_what_kernels_wrote(
    seed: int, chosen: Adversary, file: bool, frames: int, host_extents: int
) -> None:
    """In every order; and frames, and pinned memory, stay within their budgets."""
    device, error = play(seed, chosen, file=file, frames=frames, host_extents=host_extents)
    if error:
        raise error
    assert not device.unordered


# Every wait that pages on CUDA make between two actors, with a file and without: who waits for whose work.
WAITS = {
    ("read", "write"): "a read waits for the write-back of the frame, and of the extent",
    ("read", "compute"): "a frame is read into again when the kernel that used it has run",
    ("read", "backward"): "the same on another stream",
    ("write", "compute"): "a write-back waits for the kernel that changed the frame",
    ("write", "backward"): "the same on another stream",
    ("write", "read"): "a write-back waits for zeros that no kernel has used since",
    ("compute", "read"): "a kernel waits for the read",
    ("backward", "read"): "the same on another stream",
    ("compute", "backward"): "a kernel waits for one on another stream that used the frame",
    ("backward", "compute"): "the same on the other one",
    ("worker", "write"): "the file is written when the copy from the device is there",
    ("worker", "read"): "pinned memory is read into again when the copy to the device has left it",
    ("host", "worker"): "pinned memory is written back to again when the file has it",
}
OF_CLOSING = {("host", "read"), ("host", "compute"), ("host", "backward")}
# One stream's work is in order anyway; a frame that was written back is read into next, and closing waits for that.
REDUNDANT = {*((role, role) for role in ACTORS), ("host", "write")}
SEEDS = range(90)


def faulty(pair: tuple[str, str], seed: int) -> tuple[SimulatedDevice, Exception | None]:
    """A play in which this wait does nothing; with none such, it goes well."""
    unheeded = (pair,) if pair else ()
    return play(
        seed, adversary(seed), file=seed % 2 == 0, frames=2 + seed % 7, host_extents=2 + seed % 9, unheeded=unheeded
    )


def test_every_wait_is_in_the_list() -> None:
    heeded: set[tuple[str, str]] = set()
    for seed in SEEDS:
        device, error = faulty((), seed)
        assert not error
        assert not device.unordered
        heeded |= device.heeded
    assert heeded - REDUNDANT == WAITS.keys() | OF_CLOSING


@pytest.mark.parametrize("pair", WAITS, ids=" for ".join)
def test_without_a_wait_kernels_read_something_else(pair: tuple[str, str]) -> None:
    """In some order, of those that the adversary tries; the first few such are looked at."""
    errors = list(islice((str(error) for seed in SEEDS if (error := faulty(pair, seed)[1])), 5))
    assert errors, WAITS[pair]
    assert all(re.search("a kernel read|checksum mismatch", error) for error in errors)


@pytest.mark.parametrize("pair", sorted(WAITS.keys() | OF_CLOSING), ids=" for ".join)
def test_without_a_wait_accesses_are_not_ordered(pair: tuple[str, str]) -> None:
    """Whatever the order that streams ran in."""
    assert any(faulty(pair, seed)[0].unordered for seed in SEEDS), WAITS.get(pair)
