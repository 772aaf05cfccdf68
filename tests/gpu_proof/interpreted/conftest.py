"""Set-up of the tests that run in Triton's interpreter; tests/gpu_proof/test_interpreted.py starts them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lora_ops
from lora_ops.runtime.triton_launch import interpreting

if interpreting():
    from tests.gpu_proof import interpreter

    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]  # they run in a process of their own


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with lora_ops.use_backend("triton"):
        yield
