"""The gate cases of every op: what each triton_impl.py in quant/ and kernels/ lists in `gate()`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import lora_ops.kernels
import lora_ops.quant
from lora_ops.runtime.triton_launch import Expect, GateCase, Launch, record_launches


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
    """Modules `triton_impl` of the ops that declare gate cases."""
    found = []
    for package in (lora_ops.quant, lora_ops.kernels):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if info.ispkg and importlib.util.find_spec(f"{info.name}.triton_impl"):
                module = importlib.import_module(f"{info.name}.triton_impl")
                if hasattr(module, "gate"):
                    found.append(module.__name__)
    return sorted(found)


def shipped_by(module: str) -> Iterator[Shipped]:
    """Every launch that the gate cases of a module produce."""
    for case in importlib.import_module(module).gate():
        yield from launches_of(module.split(".")[-2], case)


def launches_of(op: str, case: GateCase) -> Iterator[Shipped]:
    with record_launches(run=False) as recorder:
        case.call()
    for launch in recorder.launches:
        yield Shipped(op, case, launch)
