"""Sharded parameters and models, on ranks that a process of their own forks: two, and three for uneven parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import checks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo: install a torch that is built with it"
)


@pytest.mark.parametrize(("module", "ranks"), [("adamw", 2), ("adamw", 3), ("nf4", 2)])
def test_on_ranks(module: str, ranks: int, tmp_path: Path) -> None:
    """Every check of the module; one process for all of them, since importing takes longer than most."""
    command = [sys.executable, "-m", "tests.distributed.ranks", str(tmp_path), f"tests.distributed.{module}_checks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(ranks)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    names = checks(f"tests.distributed.{module}_checks")
    assert names
    missing = [name for name in names if not (tmp_path / name).exists()]
    assert not missing, f"failed or not reached: {', '.join(missing)}\n{done.stderr[-6000:]}"
