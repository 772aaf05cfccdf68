"""Fixtures for the tests of the native library, which is called directly through lora_ops.runtime.native."""

from collections.abc import Iterator

import pytest
import torch

from lora_ops.runtime import native


@pytest.fixture(scope="session", autouse=True)
def native_library() -> None:
    """Skip, and say what to do, where the library was not built."""
    if reason := native.unavailable_reason():
        pytest.skip(reason)


@pytest.fixture(scope="module", params=native.supported_isas() if native.available() else ["native"])
def isa(request: pytest.FixtureRequest, native_library: None) -> Iterator[str]:
    """Each instruction set of this machine in turn, forced; test_every_instruction_set says which it lacks."""
    with native.force_isa(request.param):
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch, and so the library, use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
