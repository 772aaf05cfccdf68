"""Steps of the same slices over and over: laid out once for the native kernel, so that a tensor costs a microsecond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_ops.kernels.adamw import native_abi
from lora_ops.paging.native_abi import PageReport, PageTable
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native
from lora_ops.runtime.backends import current_backend
from lora_ops.runtime.trace import open_traces

_FIELDS = 13  # of lora_ops_adamw_slice, 64 bits each
_GRAD, _STATES, _ROW, _STEP = 1, slice(2, 6), 9, 11


@dataclass(slots=True)
class StepValues:
    """What a step brings that the one before did not have.

    Attributes:
        grads: the gradient of each parameter, contiguous.
        steps, row_of: the step of each parameter, and which of the rows holds for it.
        rows: of `constants`.
        seed: of stochastic rounding, or None.
    """

    grads: Sequence[Tensor]
    steps: Sequence[int]
    row_of: Sequence[int]
    rows: Sequence[tuple[float, ...]]
    seed: int | None


class SliceRow(NamedTuple):
    """Elements [first, first + n) of a parameter, and where their states are.

    `states` are addresses, or offsets in an extent, of exp_avg, exp_avg_sq and, with codes, of the absmax of each;
    `member` is the parameter's place in `StepValues`, `stream` as in `Slice`.
    """

    member: int
    param: Tensor
    grad_dtype: torch.dtype
    states: tuple[int, ...]
    first: int
    n: int
    stream: int


class SliceTable:
    """`adamw_` of slices that it has served before, with the native kernel. Who makes it keeps parameters and states.

    Args:
        rows: slices on the CPU, checked by `adamw_`.
    """

    def __init__(self, rows: Sequence[SliceRow]) -> None:
        rows = [row for row in rows if row.n]
        self._fields = np.array([_fields(row) for row in rows], dtype=np.int64).reshape(-1, _FIELDS)
        self._members = np.array([row.member for row in rows], dtype=np.int64)
        self._grad_offsets = np.array([row.first * row.grad_dtype.itemsize for row in rows], dtype=np.int64)
        present = [[i < len(row.states) for i in range(4)] for row in rows]  # 32-bit states have no absmax
        self._present = np.array(present, dtype=np.int64).reshape(-1, 4)
        self._addresses: Sequence[int] = ()
        self._bases = np.zeros(len(rows), dtype=np.int64)

    @staticmethod
    def serves() -> bool:
        """Whether `adamw_` would run on the native backend and nobody records what runs."""
        return current_backend() in ("auto", "native") and not open_traces and native.available()

    def place(self, addresses: Sequence[int], counts: Sequence[int]) -> None:
        """Have the states of the first counts[0] slices count from addresses[0] from now on, and so forth."""
        if addresses == self._addresses:
            return
        bases = np.repeat(np.array(addresses, dtype=np.int64), counts)
        self._fields[:, _STATES] += (bases - self._bases)[:, None] * self._present
        self._addresses, self._bases = addresses, bases

    def run(self, values: StepValues) -> None:
        """One step, in one kernel call."""
        native_abi.adamw_fields(*self._arguments(values))

    def run_in_pages(self, pages: PageTable, values: StepValues) -> PageReport:
        """One step of slices whose states are brought from a file and written back: they are offsets in extents."""
        if self._bases.any():
            raise ValueError("states: expected offsets in extents, got addresses")
        return native_abi.adamw_pages(pages, *self._arguments(values))

    def _arguments(self, values: StepValues) -> tuple[int, int, Tensor, Tensor, Tensor, int | None]:
        fields, members = self._fields, self._members
        addresses = np.array([grad.data_ptr() for grad in values.grads], dtype=np.int64)
        fields[:, _GRAD] = addresses[members] + self._grad_offsets
        fields[:, _ROW] = np.array(values.row_of, dtype=np.int64)[members]
        fields[:, _STEP] = np.array(values.steps, dtype=np.int64)[members]
        rows = torch.tensor(values.rows, dtype=torch.float32)
        return fields.ctypes.data, len(fields), rows, dynamic_map(True), dynamic_map(False), values.seed


def _fields(row: SliceRow) -> list[int]:
    """A lora_ops_adamw_slice; gradient, row and step are each step's."""
    param = row.param.data_ptr() + row.first * row.param.element_size()
    absent = [0] * (4 - len(row.states))
    dtypes = [native.DTYPE_NUMBERS[dtype] for dtype in (row.param.dtype, row.grad_dtype)]
    return [param, 0, *row.states, *absent, row.n, *dtypes, 0, row.stream, 0, row.first]
