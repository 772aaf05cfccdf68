"""Compiling ahead: every check is somebody's, processes that die are noted, none outlives its section."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.clocks import CpuClock
from bench.device import warm
from bench.device.checks import CHECKS
from bench.device.context import Context
from bench.device.sections import PLAN
from bench.measure import Run


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


def test_processes_that_end_or_die_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "WORKERS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(warm, "POLL_S", 0.01)
    monkeypatch.setattr(
        warm, "worker_command", lambda index, count: [sys.executable, "-c", f"raise SystemExit({index})"]
    )
    context = _context()
    assert list(warm.warm(context))[-1].endswith("in 2 processes, 1 died")
    assert not context.run.bad
    assert "compiled ahead" in context.run.notes[0]


def test_no_process_outlives_its_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(warm, "WORKERS", 1)
    monkeypatch.setattr(warm, "POLL_S", 0.01)
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(warm, "worker_command", lambda index, count: [sys.executable, "-c", code])
    section = warm.warm(_context())
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert "1 of 1 processes" in next(section)
    begin = time.monotonic()
    section.close()  # as when its share of the time is over
    assert time.monotonic() - begin < 30  # not until it ends by itself
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_command_of_a_process_can_be_run() -> None:
    compile(warm.worker_command(3, 8)[2], "worker", "exec")
    assert "work(3, 8, 'cuda')" in warm.worker_command(3, 8)[2]
