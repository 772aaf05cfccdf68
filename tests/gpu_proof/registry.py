"""What ships: every launch of the cases in gates/, which has a file for each op of quant/ and kernels/."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from lora_ops.runtime.triton_launch import Launch, pretend_capability, record_launches
from tests.gpu_proof import gates
from tests.gpu_proof.expect import MATRIX, Expect, GateCase
from tests.gpu_proof.machine_code import Chip


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


def shipped_by(op: str, chip: Chip | None = None) -> Iterator[Shipped]:
    """Every launch that the gate cases of an op produce on a chip; None: on any that has matrix instructions."""
    capability, names = (chip.capability, {chip.name}) if chip else (None, MATRIX)
    for case in importlib.import_module(f"{gates.__name__}.{op}").cases():
        if names & case.chips:
            with pretend_capability(capability) if capability else nullcontext():
                shipped = list(launches_of(op, case))
            yield from shipped


def launches_of(op: str, case: GateCase) -> Iterator[Shipped]:
    with record_launches(run=False) as recorder:
        case.call()
    for launch in recorder.launches:
        yield Shipped(op, case, launch)
