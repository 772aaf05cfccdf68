"""Compiling ahead: every check is somebody's, processes that die are noted, none outlives its section."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.clocks import CpuClock
from bench.device import warm
from bench.device.checks import CHECKS
from bench.device.context import Context
from bench.device.sections import PLAN
from bench.measure import Run
from lora_ops.runtime import cuda


def _context() -> Context:
    return Context(PLAN, CpuClock(), Run("test"))


def test_every_check_belongs_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    checks = {f"op{n}": {f"case{n}": lambda device, n=n: ran.append(f"{n} on {device}")} for n in range(7)}

    def broken(device: str) -> None:
        raise RuntimeError("out of luck")

    checks["op3"]["broken"] = broken  # type: ignore[assignment]
    monkeypatch.setattr(warm, "_todo", lambda device: [("reference", c) for op in checks.values() for c in op.values()])
    assert sum(warm.work(index, 3, "cpu") for index in range(3)) == 7
    assert sorted(ran) == [f"{n} on cpu" for n in range(7)]


def test_todo_holds_every_check_of_a_gpu_s_kernels() -> None:
    todo = {id(check) for backend, check in warm._todo("cuda") if backend != "reference"}
    assert {id(check) for op in ("lora_linear", "nf4_linear", "quantize_nf4") for check in CHECKS[op].values()} <= todo
    assert len(warm._todo("cuda")) == len(todo)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets how many processes there are and what they run, instead of what needs a GPU."""

    def set_up(count: int, worker: Callable[[int], str], build: str = "") -> None:
        monkeypatch.setattr(warm, "WORKERS", count)
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        monkeypatch.setattr(warm, "POLL_S", 0.01)
        monkeypatch.setattr(warm, "_environment", lambda: dict(os.environ))
        monkeypatch.setattr(warm, "worker_command", lambda index, count: [sys.executable, "-c", worker(index)])
        monkeypatch.setattr(warm, "build_command", lambda: [sys.executable, "-c", build])
        monkeypatch.setattr(cuda, "LIBRARY_PATH", Path("/nonexistent/library.so"))
        cuda.reload()

    yield set_up
    monkeypatch.undo()
    cuda.reload()


def test_processes_that_end_or_die_are_noted(commands: Callable[..., None]) -> None:
    commands(2, lambda index: f"raise SystemExit({index})")
    context = _context()
    assert list(warm.warm(context))[-1].endswith("in 2 processes, 1 died")
    assert not context.run.bad
    assert "compiled ahead" in context.run.notes[0]
    assert "the CUDA C++ kernels: not built: " in context.run.notes[1]


def test_a_library_that_was_built_is_found(
    commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "library.so"
    commands(1, lambda index: "", f"open({str(library)!r}, 'w')")
    monkeypatch.setattr(cuda, "LIBRARY_PATH", library)
    monkeypatch.setattr(cuda, "open_library", lambda path: path if path.exists() else cuda.CudaError("missing"))
    context = _context()
    assert cuda.unavailable_reason() == "missing"
    assert list(warm.warm(context))
    assert context.run.notes[-1] == "- the CUDA C++ kernels: built here"


def test_no_process_outlives_its_section(commands: Callable[..., None], tmp_path: Path) -> None:
    """Nor do those that it has started, such as compilers."""
    pid_file, lived_on = tmp_path / "pid", tmp_path / "lived on"
    compiler = (
        f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        f"time.sleep(300); open({str(lived_on)!r}, 'w')"
    )
    commands(1, lambda index: "", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {compiler!r}])")
    section = warm.warm(_context())
    while not pid_file.exists() or not pid_file.read_text():
        assert "of 2 processes" in next(section)
    section.close()  # as when its share of the time is over
    while _lives(int(pid_file.read_text())):
        time.sleep(0.05)
    assert not lived_on.exists()


def _lives(pid: int) -> bool:
    """Whether a process runs; a dead one whose parent died may not have been collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_of_a_process_can_be_run() -> None:
    compile(warm.worker_command(3, 8)[2], "worker", "exec")
    assert "work(3, 8, 'cuda')" in warm.worker_command(3, 8)[2]
