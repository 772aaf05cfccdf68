"""The page layer alone against a trivial model: a dictionary of bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_ops.kernels.adamw import SliceTable, StepValues
from lora_ops.paging.errors import PagingError
from lora_ops.paging.pager import Pager
from lora_ops.paging.tiers import FileTier
from lora_ops.runtime import native

EXTENT = 4096


class PageMachine(RuleBasedStateMachine):
    """Allocate, update, read, overwrite, abandon a pass, reset, damage the file, crash and start again."""

    @initialize(frames=st.integers(1, 6))
    def start(self, frames: int) -> None:
        self.folder = tempfile.mkdtemp()
        self.frames = frames
        self.open()

    def open(self) -> None:
        self.pager = Pager(FileTier(self.folder, EXTENT), self.frames)
        self.model: list[int] = []  # the byte that fills each extent
        self.damaged = False

    @rule(n=st.integers(1, 7))
    def allocate(self, n: int) -> None:
        assert list(self.pager.allocate(n)) == list(range(len(self.model), len(self.model) + n))
        self.model += [0] * n

    @precondition(lambda self: self.model and not self.damaged)
    @rule(data=st.data(), byte=st.integers(1, 255), stop_after=st.integers(0, 12))
    def update(self, data: st.DataObject, byte: int, stop_after: int) -> None:
        """Add to some extents; the pass may be abandoned between two batches."""
        extents = self.some(data)
        seen = []
        for i, batch in enumerate(sweep := self.pager.sweep(extents)):
            if i == stop_after:
                # What the last batch would have brought is unchanged, but may be marked dirty.
                sweep.close()
                break
            for e, frame in batch:
                assert self.holds(e, frame)
                frame.add_(byte)
                self.model[e] = (self.model[e] + byte) % 256
                seen.append(e)
        else:
            assert sorted(seen) == sorted(extents)

    @precondition(lambda self: self.model and not self.damaged)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        extents = self.some(data)
        seen = [(e, self.holds(e, frame)) for batch in self.pager.sweep(extents, write=False) for e, frame in batch]
        assert sorted(seen) == [(e, True) for e in sorted(extents)]

    @precondition(lambda self: self.model and not self.damaged)
    @rule(data=st.data(), byte=st.integers(0, 255), stop_after=st.integers(0, 3))
    def overwrite(self, data: st.DataObject, byte: int, stop_after: int) -> None:
        """What an abandoned pass did not come to holds zeros or what it held; which of them, it holds for good."""
        extents = self.some(data)
        for i, batch in enumerate(sweep := self.pager.sweep(extents, read=False)):
            if i == stop_after:
                sweep.close()
                break
            for e, frame in batch:
                frame.fill_(byte)
                self.model[e] = byte
                extents.remove(e)
        for batch in self.pager.sweep(extents, write=False):
            for e, frame in batch:
                self.model[e] = self.model[e] if frame.any() else 0
                assert self.holds(e, frame)

    @precondition(lambda self: not self.damaged)
    @rule(keep=st.floats(0, 0.99))
    def truncate_the_file(self, keep: float) -> None:
        """Whatever is read afterwards is right, or an error that names the file; never something else."""
        path = self.pager.tier.path
        self.settle()
        os.truncate(path, int(path.stat().st_size * keep))
        self.damaged = True

    @precondition(lambda self: self.model and self.damaged)
    @rule()
    def read_damaged(self) -> None:
        message, right = str(self.pager.tier.path), True
        try:
            for batch in self.pager.sweep(range(len(self.model)), write=False):
                right &= all(self.holds(e, frame) for e, frame in batch)
        except PagingError as error:
            message = str(error)
        assert right
        assert str(self.pager.tier.path) in message

    @rule()
    def reset(self) -> None:
        """Everything is forgotten; room and frames are kept. A damaged file does not recover its length."""
        if not self.damaged:
            self.pager.reset()
            self.model = []

    @rule()
    def crash(self) -> None:
        """As a killed process leaves it: the lock is gone, the file is there. A new pager begins with nothing."""
        leftover = self.pager.tier.path
        self.pager.close()
        leftover.write_bytes(b"left over")
        self.open()

    @invariant()
    def budget_holds(self) -> None:
        if hasattr(self, "pager"):
            assert self.pager.stats.frames <= self.frames
            frames = [page.frame.data_ptr() for page in self.pager.table if page.frame is not None]
            assert len(set(frames)) == len(frames) <= self.frames

    def teardown(self) -> None:
        if hasattr(self, "pager"):
            self.pager.close()
            assert os.listdir(self.folder) == []
            shutil.rmtree(self.folder)

    def some(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(range(len(self.model))), unique=True, min_size=1))

    def holds(self, extent: int, frame: object) -> bool:
        return bool((frame == self.model[extent]).all())  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Let the background thread finish what it was given."""
        self.pager.tier._worker.submit(lambda: None).result()


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_one_pass_at_a_time(tmp_path: object) -> None:
    pager = Pager(FileTier(None, EXTENT), 2)
    pager.allocate(3)
    first = pager.sweep([0, 1, 2])
    next(first)
    with pytest.raises(PagingError, match="already under way"):
        next(pager.sweep([0]))
    first.close()
    assert [e for batch in pager.sweep([0, 1, 2]) for e, _ in batch]
    pager.close()


def test_a_read_that_is_refused_leaves_no_other_extents_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pager = Pager(FileTier(None, EXTENT), 1)
    pager.allocate(2)
    for batch in pager.sweep([0, 1]):
        for e, frame in batch:
            frame.fill_(e + 1)

    def refuse(*_: object) -> None:
        raise PagingError("refused")

    for extent in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(pager.tier, "read", refuse)
            with pytest.raises(PagingError, match="refused"):
                list(pager.sweep([extent], write=False))
        for batch in pager.sweep([extent], write=False):
            assert [bool((frame == e + 1).all()) for e, frame in batch] == [True]
    pager.close()


def test_an_abandoned_overwrite_is_the_same_before_and_after_eviction() -> None:
    """A frame that was emptied for an extent is its content from then on, though the caller never came to it."""
    pager = Pager(FileTier(None, EXTENT), 4)
    pager.allocate(8)
    for batch in pager.sweep(range(8)):
        for e, frame in batch:
            frame.fill_(e + 1)
    first, second = [e for e, page in enumerate(pager.table) if page.frame is None][:2]
    sweep = pager.sweep([first, second], read=False)
    next(sweep)
    assert pager.table[second].frame is not None
    sweep.close()

    def content() -> int:
        return next(int(frame[0]) for batch in pager.sweep([second], write=False) for _, frame in batch)

    before = content()
    list(pager.sweep([e for e in range(8) if e != second], write=False))
    assert pager.table[second].frame is None
    assert content() == before == 0
    pager.close()


def test_what_was_touched_is_written_back_and_found_again() -> None:
    """A pass that follows another over the same extents does without looking, but not after one that moved them."""
    pager = Pager(FileTier(None, EXTENT), 3)
    pager.allocate(6)
    whole, part = (0, 1), (0,)
    list(pager.sweep(whole))

    def add(extents: tuple[int, ...]) -> bool:
        addresses = pager.touch(extents)
        if addresses is None:
            return False
        assert addresses == [pager.table[e].frame.data_ptr() for e in extents]  # type: ignore[union-attr]
        for e in extents:
            pager.table[e].frame.add_(1)  # type: ignore[union-attr]
        return True

    for round_ in range(1, 4):
        assert [add(whole), add(whole), add(part), add(whole)] == [True] * 4
        hits = pager.stats.hits
        assert add(whole)
        assert pager.stats.hits == hits + 2
        list(pager.sweep([3, 4, 5], write=False))
        assert not add(whole)
        content = {e: int(frame[0]) for batch in pager.sweep(whole, write=False) for e, frame in batch}
        assert content == {0: 5 * round_, 1: 4 * round_}  # though the passes that brought them did not change them
    pager.reset()
    with pytest.raises(IndexError):
        pager.touch(whole)
    pager.close()


def stream(pager: Pager, extents: Sequence[int]) -> int:
    """A pass of native code that changes extents, with nothing to do on them; how many it had to fetch."""
    before = pager.stats.misses, pager.tier.stats.bytes_read
    tier = pager.tier
    assert isinstance(tier, FileTier)
    stored = {e for e in extents if pager.table[e].frame is None and pager.table[e].stored}
    with pager.native_pass(extents, dict.fromkeys(extents, (0, 0))) as work:
        work.report = SliceTable([]).run_in_pages(work.pages, StepValues((), (), (), (), None))
    assert tier.stats.bytes_read - before[1] == len(stored) * EXTENT
    return pager.stats.misses - before[0]


@pytest.mark.skipif(not native.available(), reason=f"only native code streams pages: {native.BUILD_HINT}")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 9])
def test_a_streamed_pass_misses_the_fewest_extents(frames: int, threads: int) -> None:
    """All but those that frames hold, whatever came before; and what fits beside what is idle leaves it where it is."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    pager = Pager(FileTier(None, EXTENT), frames)
    try:
        pager.allocate(9)
        for extents in (range(9), range(3, 9), range(4), range(9)):
            stream(pager, extents)
            assert [stream(pager, extents) for _ in range(4)] == [max(0, len(extents) - frames)] * 4
        pager.reset()
        pager.allocate(9)
        for first in range(0, frames // 2 * 2, 2):  # two at a time, as many as there are frames for
            assert stream(pager, [first, first + 1]) == 2
        assert stream(pager, range(frames // 2 * 2)) == 0
    finally:
        pager.close()
        torch.set_num_threads(usual)


@pytest.mark.skipif(not native.available(), reason=f"only native code streams pages: {native.BUILD_HINT}")
def test_a_new_extent_is_zeros_in_a_frame_that_was_used() -> None:
    pager = Pager(FileTier(None, EXTENT), 1)
    pager.allocate(3)
    for batch in pager.sweep([0]):
        batch[0][1].fill_(7)
    stream(pager, [1, 2])
    content = {e: frame.unique().tolist() for batch in pager.sweep(range(3), write=False) for e, frame in batch}
    assert content == {0: [7], 1: [0], 2: [0]}
    pager.close()
