"""Compiles kernels ahead: processes run the checks beside each other, and leave what they compiled in Triton's cache.

The checks need about 200 kernels, 0.3 to 1 s each; one after the other they would take a third of the suite's time.
Nothing is reported from here: the checks run again, in their sections. A process that dies costs the others nothing.
One more process builds the CUDA C++ kernels, where they are missing and nvcc is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from bench.device.checks import Check, checks_on
from bench.device.context import Context
from bench.environment import ROOT
from lora_ops import use_backend
from lora_ops.runtime import cuda
from lora_ops.runtime.backends import BACKENDS

WORKERS = 8
POLL_S = 2.0


def _todo(device: str) -> list[tuple[str, Check]]:
    """Every check on every backend that compiles, each once."""
    from bench.device.discover import backends_of, registered_ops

    found: dict[int, tuple[str, Check]] = {}
    checks = checks_on(device)
    for op in registered_ops():
        for backend, unavailable in backends_of(op, device).items():
            compiles = BACKENDS[backend].automatic and backend != "reference"
            if unavailable is None and (compiles or device == "cpu"):
                found |= {id(check): (backend, check) for check in checks.get(op.name, {}).values()}
    return list(found.values())


def work(index: int, count: int, device: str) -> int:
    """Run every count-th check from the index-th on; answers how many ran through."""
    done = 0
    for backend, check in _todo(device)[index::count]:
        with contextlib.suppress(Exception), use_backend(backend):  # its section says what is wrong
            check(device)
            done += 1
        if device == "cuda":
            torch.cuda.empty_cache()
    return done


def worker_command(index: int, count: int) -> list[str]:
    """The command of one process."""
    return [sys.executable, "-c", f"from bench.device.warm import work; print(work({index}, {count}, 'cuda'))"]


def build_command() -> list[str]:
    """The command that builds the CUDA C++ kernels in place."""
    return [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]


def _environment() -> dict[str, str]:
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    major, minor = torch.cuda.get_device_capability()
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "LORA_OPS_BUILD_CUDA": "only",
        "LORA_OPS_CUDA_ARCHITECTURES": f"{major}{minor}",  # of this GPU alone: a few seconds
    }


def warm(context: Context) -> Iterator[str]:
    """Compile in several processes; yields while they run, and ends them if it is closed."""
    if context.dry:
        yield f"{work(0, 100, context.plan.device)} checks ran"
        return
    count = max(1, min(WORKERS, (os.cpu_count() or 1) - 1))
    commands = [worker_command(index, count) for index in range(count)]
    build = cuda.unavailable_reason() is not None and torch.version.hip is None
    commands += [build_command()] * build
    begin, environment = time.perf_counter(), _environment()
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        for command in commands
    ]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            yield f"{sum(process.poll() is None for process in processes)} of {len(processes)} processes compile"
        died = sum(bool(process.returncode) for process in processes[:count])
        told = f"{time.perf_counter() - begin:.0f} s in {count} processes" + f", {died} died" * bool(died)
        context.run.notes.append(f"- kernels of the checks compiled ahead: {told}")
        yield told
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
            process.wait()
        if build:
            cuda.reload()
            reason = cuda.unavailable_reason()
            context.run.notes.append(f"- the CUDA C++ kernels: {f'not built: {reason}' if reason else 'built here'}")
