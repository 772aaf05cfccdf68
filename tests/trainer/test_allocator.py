"""tune_allocator in a process of its own: repeated large tensors stop faulting their pages in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
if "tuned" in sys.argv:
    from lora_ops.trainer.allocator import tune_allocator
    assert tune_allocator() is None

def step():
    a = torch.ones(4 << 20)  # 16 MiB, which is never below glibc's own threshold at first
    b = torch.ones(16 << 20)
    del a, b

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_reuse_their_pages() -> None:
    assert faults("tuned") < 1000 < faults()
