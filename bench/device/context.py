"""What a section of the GPU suite works with."""

from __future__ import annotations

from dataclasses import dataclass

from bench.ceilings import Ceilings
from bench.clocks import Clock
from bench.measure import Run
from bench.plan import Plan


@dataclass
class Context:
    """What a section works with.

    Attributes:
        plan, clock: shapes, device and how to time.
        run: where results go.
        dry: tiny sizes, to try the suite without a GPU.
    """

    plan: Plan
    clock: Clock
    run: Run
    dry: bool = False

    @property
    def ceilings(self) -> Ceilings:
        """As measured; infinite where that section failed, so that the others still run."""
        return (
            Ceilings(**self.run.ceilings) if self.run.ceilings else Ceilings(float("inf"), float("inf"), float("inf"))
        )
