"""Parameters and models under FSDP2 and DDP, on ranks that a process of their own forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from tests.distributed.ranks import checks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo: install a torch that is built with it"
)


# torch 2.11's FSDP2 raises on any integer Parameter; 2.12 was not tried.
NEEDS_NEWER_TORCH = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="FSDP2 shards integer Parameters since: pip install 'torch>=2.13'",
)


@pytest.mark.parametrize(
    ("module", "ranks"),
    [("adamw", 2), ("adamw", 3), pytest.param("nf4", 2, marks=NEEDS_NEWER_TORCH), ("ddp", 2)],
)
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
