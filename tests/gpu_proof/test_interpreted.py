"""Runs tests/gpu_proof/interpreted with TRITON_INTERPRET=1, all files in one process, and shows what fails there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
OPTIONS = ("-q", "-p", "no:cacheprovider", "--no-header")
ENDED = "pytest ended with status"
# Imports take longer than the tests of most files.
SERVE = f"""
import sys, pytest
for path in sys.stdin:
    status = pytest.main([*{OPTIONS}, path.strip()])
    print("\\n{ENDED}", int(status), flush=True)
"""


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[Path], tuple[int, str]]]:
    """`interpreted(path)` runs a file: pytest's status, or that of a process that died, and what it printed."""
    # The interpreter's arrays are small: threads only get into each other's way.
    search = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    process: subprocess.Popen[str] | None = None

    def run(path: Path) -> tuple[int, str]:
        nonlocal process
        if process is None or process.poll() is not None:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        print(path, file=process.stdin, flush=True)
        printed = []
        for line in process.stdout:
            if line.startswith(ENDED):
                return int(line.split()[-1]), "".join(printed)
            printed.append(line)
        return process.wait(), "".join(printed)

    yield run
    if process is not None:
        process.communicate()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_interpreter(interpreted: Callable[[Path], tuple[int, str]], path: Path) -> None:
    status, printed = interpreted(path)
    assert status == 0, (
        f"TRITON_INTERPRET=1 python -m pytest {' '.join(OPTIONS)} {path.relative_to(ROOT)}\n{printed[-24000:]}"
    )
    print(printed.splitlines()[-2])
