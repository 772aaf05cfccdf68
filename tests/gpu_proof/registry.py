"""What ships: every launch of the cases in gates/, which has a file for each op of quant/ and kernels/."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

from lora_ops.runtime.triton_launch import Launch, record_launches
from tests.gpu_proof import gates
from tests.gpu_proof.expect import Expect, GateCase


@dataclass(frozen=True)
class Shipped:
    """One launch of a gate case."""

    op: str  # the op's folder
    case: GateCase
    launch: Launch

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__

    @property
    def expect(self) -> Expect:
        return self.case.expects(self.kernel)

    @property
    def id(self) -> str:
        return f"{self.op} | {self.case.name} | {self.kernel.strip('_')}"


def ops() -> list[str]:
    """The ops that have gate cases."""
    return sorted(info.name for info in pkgutil.iter_modules(gates.__path__))


def shipped_by(op: str) -> Iterator[Shipped]:
    """Every launch that the gate cases of an op produce."""
    for case in importlib.import_module(f"{gates.__name__}.{op}").cases():
        yield from launches_of(op, case)


def launches_of(op: str, case: GateCase) -> Iterator[Shipped]:
    with record_launches(run=False) as recorder:
        case.call()
    for launch in recorder.launches:
        yield Shipped(op, case, launch)
