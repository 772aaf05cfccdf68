"""Runs tests/gpu_proof/interpreted with TRITON_INTERPRET=1, one process a file, and shows what fails there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason='triton is missing: pip install -e ".[test]"')
ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(path)]
    search = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    # The interpreter's arrays are small: threads only get into each other's way.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"TRITON_INTERPRET=1 {' '.join(command[1:])}\n{done.stdout[-20000:]}{done.stderr[-4000:]}"
    )
    print(done.stdout.splitlines()[-1])
