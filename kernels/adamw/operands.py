"""What the backends of adamw_ take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Slices(NamedTuple):
    """Slices of parameters with their states, as op.py describes one, and what they share.

    Attributes:
        params, grads, exp_avgs, exp_avg_sqs: one tensor a slice.
        absmaxes: of slices with 8-bit states alone, two a slice: exp_avg's and exp_avg_sq's.
        constants: float32 [rows, 8], a row for each combination of group and step.
        places: int64 [slices, 4]: row, stream, step and first element.
        seed: of stochastic rounding, or None.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    absmaxes: Sequence[Tensor]
    constants: Tensor
    places: Tensor
    seed: int | None
