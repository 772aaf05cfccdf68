"""What may happen to files and processes: kills, full disks, corruption, truncation, two owners."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from lora_ops.optim import AdamW, PagingError, optimizer_memory
from lora_ops.optim.paged import PagedStates
from lora_ops.paging.checksum import checksum
from lora_ops.runtime import native
from tests.optim.conftest import EXTENT, Run, assert_equal

ROOT = Path(__file__).parents[2]
OPTIM = str(ROOT / "lora_ops" / "optim") + os.sep


def paged(folder: Path, n: int = 1 << 16) -> tuple[nn.Parameter, AdamW]:
    """A parameter whose states take 32 extents, four of them in frames, after a step."""
    p = nn.Parameter(torch.randn(n))
    optimizer = AdamW([p], page_budget=4 * EXTENT, extent_bytes=EXTENT, page_dir=folder)
    step(p, optimizer)
    return p, optimizer


def step(p: nn.Parameter, optimizer: AdamW) -> None:
    p.grad = torch.randn_like(p)
    optimizer.step()


def repeat(optimizer: AdamW, laid_out: bool) -> None:
    """Let the next step be one of slices that are laid out for the native kernel, or the first of its kind."""
    if laid_out and native.available():
        assert optimizer._plan is not None
        assert optimizer._plan._table is not None
    else:
        optimizer._plan = None


def test_kill_9_at_random_moments() -> None:
    command = [sys.executable, "-m", "tests.optim.crash", "--rounds", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"32 bits: 5 kills, 5 checkpoints loaded and right", done.stdout)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("damage", ["corrupted", "truncated"])
def test_damaged_page_file(damage: str, laid_out: bool, tmp_path: Path) -> None:
    """Seen by the next step, whether it is like those before it or the first of its kind."""
    p, optimizer = paged(tmp_path)
    for _ in range(3 * laid_out):
        step(p, optimizer)
    repeat(optimizer, laid_out)
    file = tmp_path / "lora_ops.pages"
    optimizer.save_checkpoint(tmp_path / "good")
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    if damage == "corrupted":
        with open(file, "r+b") as f:
            for extent in range(32):
                f.seek(extent * EXTENT + 777)
                byte = f.read(1)[0]
                f.seek(extent * EXTENT + 777)
                f.write(bytes([byte ^ 4]))
    else:
        os.truncate(file, EXTENT + 5)
    message = rf"{file}: (extent \d+ .* checksum mismatch|truncated: extent \d+)"
    with pytest.raises(PagingError, match=message):
        step(p, optimizer)
    with pytest.raises(PagingError, match=r"a step was cut short .* load a checkpoint before going on"):
        step(p, optimizer)
    with pytest.raises(PagingError, match="a step was cut short"):
        optimizer.save_checkpoint(tmp_path / "bad")
    with pytest.raises(PagingError, match="a step was cut short"):
        optimizer.state_dict()
    optimizer.load_checkpoint(tmp_path / "good")
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    step(p, optimizer)
    optimizer.close()


def test_two_owners_of_one_folder(tmp_path: Path) -> None:
    _, optimizer = paged(tmp_path)
    code = (
        "import sys, torch; from lora_ops.optim import AdamW\n"
        "AdamW([torch.nn.Parameter(torch.ones(3))], page_budget='1MiB', page_dir=sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"page_dir: {tmp_path} is in use by process {os.getpid()}, which holds {tmp_path}" in done.stderr
    with pytest.raises(PagingError, match="is in use by process"):
        paged(tmp_path)
    optimizer.close()
    paged(tmp_path)[1].close()


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the process goes to another one: saving finds it, and nothing is left in it."""
    monkeypatch.chdir(tmp_path)
    p = nn.Parameter(torch.ones(5000))
    optimizer = AdamW([p], page_budget=16 << 10, extent_bytes=8 << 10, page_dir="pages")
    p.grad = torch.ones(5000)
    optimizer.step()
    monkeypatch.chdir("/")
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], torch.full((5000,), 0.1))
    optimizer.close()
    assert not list((tmp_path / "pages").iterdir())


def test_a_folder_that_is_gone_names_itself_in_the_error(tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(5000))
    optimizer = AdamW([p], page_budget=16 << 10, extent_bytes=8 << 10, page_dir=tmp_path / "pages")
    p.grad = torch.ones(5000)
    optimizer.step()
    shutil.rmtree(tmp_path / "pages")
    with pytest.raises(PagingError, match=r"pages: cannot save the state: No such file"):
        optimizer.state_dict()
    optimizer.step()  # the page file is open
    optimizer.close()


@pytest.mark.parametrize("name", ["lora_ops.lock", "lora_ops.pages"])
def test_what_a_link_points_to_is_not_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / name).symlink_to(tmp_path / "other")
    with suppress(PagingError):
        AdamW([nn.Parameter(torch.ones(3))], page_budget="1MiB", page_dir=tmp_path / "pages").close()
    assert (tmp_path / "other").read_text() == "kept"


def test_a_folder_in_the_place_of_the_page_file(tmp_path: Path) -> None:
    (tmp_path / "lora_ops.pages").mkdir()
    for _ in range(2):  # the lock is let go of
        with pytest.raises(PagingError, match=r"cannot write in .*: Is a directory \(.*lora_ops.pages\)"):
            AdamW([nn.Parameter(torch.ones(3))], page_budget="1MiB", page_dir=tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["planned", "laid out", "repeated"])
@pytest.mark.parametrize("pages", [{}, {"page_budget": 16 << 10, "extent_bytes": 8 << 10}], ids=["no pages", "pages"])
def test_an_interrupt_at_any_line_of_a_step(pages: dict[str, int], steps: int) -> None:
    """Ctrl-C leaves the old state or the new one, or an optimizer that refuses to go on."""
    sizes = (5000, 300)

    def grads(params: list[nn.Parameter], step: int) -> None:
        for p in params:
            p.grad = torch.randn(len(p), generator=torch.Generator().manual_seed(step))

    def fresh() -> tuple[list[nn.Parameter], AdamW]:
        params = [nn.Parameter(torch.ones(n)) for n in sizes]
        optimizer = AdamW(params, lr=1e-2, **pages)
        for step in range(steps):
            grads(params, step)
            optimizer.step()
        grads(params, steps)
        return params, optimizer

    params, optimizer = fresh()
    optimizer.step()
    after = [p.detach().clone() for p in params]
    grads(params, steps + 1)
    optimizer.step()
    last = [p.detach().clone() for p in params]

    def same(expected: list[torch.Tensor]) -> bool:
        return all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))

    refused, line, lines = 0, 0, 1
    while line < lines:
        params, optimizer = fresh()
        lines = interrupted(optimizer.step, line)
        try:
            if not same(after):
                optimizer.step()
                assert same(after), line
            grads(params, steps + 1)
            optimizer.step()
            assert same(last), line
        except PagingError as error:
            assert "a step was cut short" in str(error)  # noqa: PT017
            refused += 1
        optimizer.close()
        line += 1
    assert 0 < refused < lines


def interrupted(work: Callable[[], object], at: int) -> int:
    """Do some work and raise KeyboardInterrupt at a line of lora_ops.optim, counted as they are run; how many came."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(OPTIM):
            return None
        if event == "line":
            lines += 1
            if lines == at + 1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        lines += 1  # there may be one more
    finally:
        sys.settrace(None)
    return lines


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PagingError, match=f"page_dir: cannot write in {tmp_path}/file/pages: Not a directory"):
        paged(tmp_path / "file" / "pages")
    with pytest.raises(PagingError, match="page_dir: cannot write in /proc/self/pages"):
        paged(Path("/proc/self/pages"))
    p = nn.Parameter(torch.ones(3))
    for folder, why in (("missing", "No such file"), ("file", "Not a directory")):
        with pytest.raises(PagingError, match=f"{tmp_path}/{folder}/x: cannot write the checkpoint: {why}"):
            AdamW([p]).save_checkpoint(tmp_path / folder / "x")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small tmpfs; run as root with CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """Before a step has changed anything; and an earlier checkpoint survives a failed one."""
    p = nn.Parameter(torch.randn(1 << 18))
    optimizer = AdamW([p], page_budget=4 * EXTENT, extent_bytes=EXTENT, page_dir=small_disk)
    before = p.detach().clone()
    with pytest.raises(PagingError, match=rf"{small_disk}/lora_ops.pages: cannot grow to 2097152: No space left .*"):
        step(p, optimizer)
    assert torch.equal(p, before)
    optimizer.close()
    p, optimizer = paged(tmp_path / "elsewhere", 1 << 15)
    optimizer.save_checkpoint(small_disk / "x")
    saved = (small_disk / "x").read_bytes()
    (small_disk / "filler").write_bytes(bytes(700 << 10))
    step(p, optimizer)
    with pytest.raises(PagingError, match=f"{small_disk}/x: cannot write the checkpoint: No space left"):
        optimizer.save_checkpoint(small_disk / "x")
    assert (small_disk / "x").read_bytes() == saved
    assert not (small_disk / "x.partial").exists()
    optimizer.close()


def test_full_disk_by_rlimit(tmp_path: Path) -> None:
    """The same without a mount: a limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys, torch; from lora_ops.optim import AdamW\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "p = torch.nn.Parameter(torch.randn(1 << 18)); p.grad = torch.randn(1 << 18)\n"
        "AdamW([p], page_budget=1 << 16, extent_bytes=1 << 14, page_dir=sys.argv[1]).step()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"PagingError: {tmp_path}/lora_ops.pages: cannot grow to 2097152: File too large" in done.stderr


def test_a_step_after_room_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that found the disk full leave no trace: no extents, and the same bits as if they had not been."""
    p, q = (nn.Parameter(torch.arange(20_000.0)) for _ in range(2))
    optimizer, plain = AdamW([p], page_budget=4 * EXTENT, extent_bytes=EXTENT, page_dir=tmp_path), AdamW([q])
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail(errno.ENOSPC))
        for _ in range(3):
            with pytest.raises(PagingError, match=r"lora_ops\.pages: cannot grow to .*: No space left on device; free"):
                step(p, optimizer)
    p.grad = q.grad = torch.ones(20_000)
    optimizer.step()
    plain.step()
    assert torch.equal(p, q)
    assert (
        optimizer.paging_stats().extents
        == optimizer_memory([20_000], page_budget=4 * EXTENT, extent_bytes=EXTENT).extents
    )
    optimizer.close()


def test_writes_that_fail_cost_no_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails in the middle of steps; after each a checkpoint is loaded."""
    p, optimizer = paged(tmp_path)
    optimizer.save_checkpoint(tmp_path / "x", params=True)
    for _ in range(6):  # more often than there are frames
        repeat(optimizer, False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail(errno.EIO))
            with pytest.raises(
                PagingError, match=rf"{tmp_path}/lora_ops.pages: cannot write byte \d+: Input/output error"
            ):
                step(p, optimizer)
        optimizer.load_checkpoint(tmp_path / "x")
    assert_every_frame_serves(p, optimizer)
    optimizer.close()


def test_a_write_that_fails_behind_the_step_is_seen_ever_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step may be over by then. What the file still holds is older than the extent, and no read takes it for it."""
    p, optimizer = paged(tmp_path)
    step(p, optimizer)
    assert isinstance(optimizer._store, PagedStates)
    pager = optimizer._store.pager
    in_file = next(e for e, page in enumerate(pager.table) if page.frame is None)
    with monkeypatch.context() as patch, suppress(PagingError):  # it may be seen at once
        patch.setattr(os, "pwritev", fail(errno.EIO))
        assert len(list(pager.sweep([in_file]))) == 1  # in the frame of another one, which is written, and lost
        pager._writes.pop().result()
    for _ in range(2):
        with pytest.raises(PagingError, match="checksum mismatch"):
            optimizer.state_dict()
    optimizer.close()


@pytest.mark.skipif(not native.available(), reason=f"only native code streams pages: {native.BUILD_HINT}")
@pytest.mark.parametrize(("flags", "what"), [(os.O_RDONLY, "write"), (os.O_WRONLY, "read")])
def test_a_repeated_step_on_a_disk_that_fails(flags: int, what: str, tmp_path: Path) -> None:
    """The error names the file; frames are not lost, and what was half written is not taken for an extent."""
    p, optimizer = paged(tmp_path)
    optimizer.save_checkpoint(tmp_path / "x", params=True)
    assert isinstance(optimizer._store, PagedStates)
    pager = optimizer._store.pager
    for _ in range(6):  # more often than there are frames
        for _ in range(3):
            step(p, optimizer)
        repeat(optimizer, True)
        good = os.dup(pager.tier._fd)  # type: ignore[attr-defined]
        bad = os.open(tmp_path / "lora_ops.pages", flags)
        os.dup2(bad, pager.tier._fd)  # type: ignore[attr-defined]
        with pytest.raises(
            PagingError, match=rf"{tmp_path}/lora_ops.pages: cannot {what} byte \d+: Bad file descriptor"
        ):
            step(p, optimizer)
        os.dup2(good, pager.tier._fd)  # type: ignore[attr-defined]
        os.close(good)
        os.close(bad)
        assert len(pager._free) + sum(page.frame is not None for page in pager.table) == 4
        with pytest.raises(PagingError, match="a step was cut short"):
            optimizer.save_checkpoint(tmp_path / "bad")
        optimizer.load_checkpoint(tmp_path / "x")
    assert_every_frame_serves(p, optimizer)
    optimizer.close()


def assert_every_frame_serves(p: nn.Parameter, optimizer: AdamW) -> None:
    before = optimizer.paging_stats()
    step(p, optimizer)
    after = optimizer.paging_stats()
    assert after.hits - before.hits == 4
    assert after.resident == 4 * EXTENT


def fail(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("load_paged", [True, False])
def test_resume_is_bit_identical(adamw: Callable, bits: int, load_paged: bool, tmp_path: Path) -> None:
    """Paged → checkpoint → paged or not equals the uninterrupted run, and stays paged."""
    pages = {"page_budget": 4 * EXTENT, "extent_bytes": EXTENT}
    whole = Run(adamw(state_bits=bits)).train(20)
    first = Run(adamw(state_bits=bits, **pages)).train(10)
    first.optimizer.save_checkpoint(tmp_path / "x", params=True)
    second = Run(adamw(state_bits=bits, **(pages if load_paged else {})))
    second.optimizer.load_checkpoint(tmp_path / "x")
    second.schedule.load_state_dict(first.schedule.state_dict())
    second.steps = 10
    assert_equal(second.train(20).tensors(), whole.tensors())
    if load_paged:
        stats = second.optimizer.paging_stats()
        assert stats.peak <= 4 * EXTENT
        assert bits == 8 or stats.misses > 0


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing", "other", "header", "uncovered"])
def test_damaged_checkpoint_changes_nothing(damage: str, tmp_path: Path, adamw: Callable) -> None:
    run = Run(adamw()).train(3)
    file = tmp_path / "x"
    run.optimizer.save_checkpoint(file, params=True)
    whole = file.read_bytes()
    content = {
        "flipped": whole[:-3000] + bytes([whole[-3000] ^ 1]) + whole[-2999:],
        "truncated": whole[:-1],
        "empty": b"",
        "other": (40).to_bytes(8, "little") + b'{"x": 1}' + b" " * 32,
        "header": whole.replace(rb"\"lr\": 0.0", rb"\"lr\": 0.1", 1),
        "uncovered": forget_last_piece(whole),
    }.get(damage)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    run.train(4)
    before = run.tensors()
    with pytest.raises(PagingError, match=str(file)):
        run.optimizer.load_checkpoint(file)
    assert_equal(run.tensors(), before)


def forget_last_piece(whole: bytes) -> bytes:
    """The checkpoint with a changed byte in its last piece, which its table of checksums does not know any more."""
    size = int.from_bytes(whole[:8], "little")
    begin, end = (8 + size + n for n in json.loads(whole[8 : 8 + size])["checksums"]["data_offsets"])
    table = torch.frombuffer(bytearray(whole[begin:end]), dtype=torch.int64).view(-1, 3)
    offset = int(table[-1, 0])
    empty = checksum(memoryview(b""))
    table[-1] = torch.tensor([offset, 0, empty - (empty >> 63 << 64)])
    changed = bytearray(whole)
    changed[begin:end] = table.numpy().tobytes()
    changed[offset] ^= 1
    return bytes(changed)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure is no kill -9: what was not synced may be gone, and the name be there."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record(fd: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def rename(*paths: Path) -> None:
        seen.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    AdamW([nn.Parameter(torch.ones(3))]).save_checkpoint(tmp_path / "x")
    assert seen == [f"{tmp_path}/x.partial", "rename", str(tmp_path)]


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PagingError, match="cannot read the checkpoint: Is a directory"):
        AdamW([nn.Parameter(torch.ones(3))]).load_checkpoint(tmp_path)


@pytest.mark.parametrize("pages", [{}, {"page_budget": "1MiB"}], ids=["no pages", "pages"])
def test_a_closed_optimizer_loads_nothing(pages: dict[str, Any], tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdamW([p], **pages)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.save_checkpoint(tmp_path / "x")
    optimizer.close()
    for load in (lambda: optimizer.load_state_dict(state), lambda: optimizer.load_checkpoint(tmp_path / "x")):
        with pytest.raises(PagingError, match="the optimizer was closed"):
            load()


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_step_inside_a_step_is_seen_ever_after(laid_out: bool, tmp_path: Path) -> None:
    """As another thread makes it: the outer one ends, and does not hide that the other did not."""
    p, optimizer = paged(tmp_path)
    for _ in range(3 if laid_out else 0):
        step(p, optimizer)
    repeat(optimizer, laid_out)
    store = optimizer._store
    assert isinstance(store, PagedStates)
    name = "native_pass" if laid_out and native.available() else "sweep"
    plain = getattr(store.pager, name)

    def nested(*args: Any, **kwargs: Any) -> Any:
        setattr(store.pager, name, plain)
        store.pager._sweeping = True
        with pytest.raises(PagingError, match="a pass over the extents is already under way"):
            optimizer.step()
        store.pager._sweeping = False
        return plain(*args, **kwargs)

    setattr(store.pager, name, nested)
    step(p, optimizer)
    with pytest.raises(PagingError, match="already under way"):
        step(p, optimizer)


def test_checkpoint_of_another_model_changes_nothing(tmp_path: Path, adamw: Callable) -> None:
    a, b = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(6000))
    for p in (a, b):
        p.grad = torch.ones_like(p)
    one, other = AdamW([a]), AdamW([b])
    one.step()
    other.step()
    one.save_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match=r"state\.0\.exp_avg: expected shape \(6000,\), got \(5000,\)"):
        other.load_checkpoint(tmp_path / "x")
    assert other.state[b]["step"] == 1
    AdamW([a]).save_checkpoint(tmp_path / "x", params=True)  # before any step: there are no states
    with pytest.raises(ValueError, match=r"param\.0: expected shape \(6000,\), got \(5000,\)"):
        other.load_checkpoint(tmp_path / "x")
    turned = AdamW([nn.Parameter(torch.zeros(2, 2500))])
    AdamW([nn.Parameter(torch.zeros(2500, 2))]).save_checkpoint(tmp_path / "y", params=True)
    with pytest.raises(ValueError, match=r"param\.0: expected shape \(2, 2500\), got \(2500, 2\)"):
        turned.load_checkpoint(tmp_path / "y")
    assert other.state[b]["step"] == 1


def test_a_fork_does_not_touch_the_pages(tmp_path: Path) -> None:
    """Data loaders fork: their exit must not delete the parent's file, and a step there is refused."""
    p, optimizer = paged(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            step(p, optimizer)
        except PagingError as error:
            optimizer.close()
            os._exit(7 if "of which this one is a fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "lora_ops.pages").exists()
    with pytest.raises(PagingError, match=f"is in use by process {os.getpid()}"):
        paged(tmp_path)
    step(p, optimizer)
    optimizer.close()


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("budget", [4, 100])
def test_what_a_fork_does_is_not_done_to_the_parent(budget: int, laid_out: bool) -> None:
    """It may step where nothing moves, on a copy; where it is refused, extents in frames may come first."""
    p = nn.Parameter(torch.randn(1 << 16))
    optimizer = AdamW([p], page_budget=budget * EXTENT, extent_bytes=EXTENT)
    for _ in range(3 if laid_out else 1):
        step(p, optimizer)
    repeat(optimizer, laid_out)
    frames = [page.frame for page in optimizer._store.pager.table if page.frame is not None]  # type: ignore[union-attr]
    before = [frame.clone() for frame in frames]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # those of the parent's pool are not in the child
        try:
            step(p, optimizer)
        except PagingError:
            os._exit(7)
        os._exit(6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (7 if budget == 4 else 6)
    assert all(map(torch.equal, frames, before))
    optimizer.close()
