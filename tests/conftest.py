"""What every test shares: seeds, backends and hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

import lora_ops
from lora_ops.runtime.backends import BACKENDS
from tests.cases import CPU_BACKENDS

# No deadline: the first example pays for imports and code generation. Examples derive from the test, so CI repeats.
hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _extensions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Extensions that torch builds for PEFT go here: the user's cache may hold the lock of a killed run."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))


def pytest_configure() -> None:
    # Tests run many tiny ops, where a second thread gains nothing and waits for its core on a busy machine; what
    # depends on the number of threads sets it. `make test` has a process for each core.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: what packs them may write the time, and every process must collect the same ids."""
    return argname if isinstance(val, bytes) else None


def _say_what_to_install(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Complete the reason of pytest.importorskip, which only says what is missing."""
    if report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if "could not import" in reason:
            report.longrepr = path, line, f'{reason}: pip install -e ".[test]"'


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _say_what_to_install(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _say_what_to_install(report)
    return report


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every backend that this machine has."""
    if reason := BACKENDS[request.param].unavailable():
        pytest.skip(f"{request.param} backend: {reason}")
    with lora_ops.use_backend(request.param):
        yield request.param
