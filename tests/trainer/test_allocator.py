"""tune_allocator in a process of its own: repeated large tensors stop faulting their pages in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, statistics, sys, torch
if "tuned" in sys.argv:
    from lora_ops.trainer.allocator import tune_allocator
    assert tune_allocator() is None

def step():
    a = torch.ones(4 << 20)  # 16 MiB, which is never below glibc's own threshold at first
    b = torch.ones(16 << 20)
    del a, b

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The median step: once, in one process of five, a small block that is kept moves `b` to pages that are new.
print(int(statistics.median(faults() for _ in range(11))))
"""


def faults(*arguments: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it tunes glibc's malloc: run on a Linux with glibc")
def test_large_tensors_reuse_their_pages() -> None:
    assert faults("tuned") < 100 < 10_000 < faults()
