"""A step of the same slices again: laid out once for the native kernel, so that a tensor costs a microsecond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_ops.kernels.adamw.op import Slice
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native
from lora_ops.runtime.dispatch import current_backend, tracing

_GRAD, _STATES, _ROW, _STEP = 1, slice(2, 6), 9, 11  # fields of lora_ops_adamw_slice, 64 bits each


@dataclass(slots=True)
class Again:
    """What is new in a step: for each parameter the address of its gradient, the row that holds for it and its step.

    Gradients are contiguous and of the dtypes that they had.
    """

    grads: Sequence[int]
    index: Sequence[int]
    steps: Sequence[int]
    rows: Sequence[tuple[float, ...]]
    seed: int | None


class Table:
    """`adamw_` of slices that it has served before. Who makes it keeps their tensors, gradients apart.

    Args:
        slices: on the CPU, checked by `adamw_`.
        owners: the parameter that each slice is of, as `Again` counts them.
        base: an address that those of the states count from; they move with it.
    """

    def __init__(self, slices: Sequence[Slice], owners: Sequence[int], base: int = 0) -> None:
        kept = [(s, owner) for s, owner in zip(slices, owners, strict=True) if s.param.numel()]
        self._fields = np.array([_fields(s) for s, _ in kept], dtype=np.int64).reshape(-1, 13)
        self._owners = np.array([owner for _, owner in kept], dtype=np.int64)
        self._offsets = np.array([s.first * s.grad.element_size() for s, _ in kept], dtype=np.int64)
        states = self._fields[:, _STATES]
        self._moving = (states != 0).astype(np.int64)  # 32-bit states have no absmax
        self._base = base
        self._bases = np.zeros(len(self._fields), dtype=np.int64)

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """The slices of some tables, one table after the other, with states at address 0."""
        table = cls([], [])
        table._fields = np.concatenate([table._fields, *(t._fields for t in tables)])
        table._owners = np.concatenate([table._owners, *(t._owners for t in tables)])
        table._offsets = np.concatenate([table._offsets, *(t._offsets for t in tables)])
        table._moving = np.concatenate([table._moving, *(t._moving for t in tables)])
        bases = np.repeat(np.array([t._base for t in tables], dtype=np.int64), [len(t) for t in tables])
        table._fields[:, _STATES] -= bases[:, None] * table._moving
        table._bases = np.zeros_like(bases)
        return table

    @staticmethod
    def serves() -> bool:
        """Whether `adamw_` would run on the native backend and nobody records what runs."""
        return current_backend() in ("auto", "native") and not tracing() and native.available()

    def move(self, base: int) -> Table:
        """Have the states lie at another address from now on."""
        if base != self._base:
            self._fields[:, _STATES] += (base - self._base) * self._moving
            self._base = base
        return self

    def place(self, addresses: Sequence[int], counts: Sequence[int]) -> None:
        """Have the states of the first counts[0] slices lie at addresses[0] from now on, and so forth."""
        bases = np.repeat(np.array(addresses, dtype=np.int64), counts)
        self._fields[:, _STATES] += (bases - self._bases)[:, None] * self._moving
        self._bases = bases

    @staticmethod
    def run(tables: Sequence[Table], again: Again) -> None:
        """One step of all slices of some tables, in one kernel call."""
        for table in tables:
            table._renew(again)
        together = tables[0]._fields if len(tables) == 1 else np.concatenate([table._fields for table in tables])
        constants = torch.tensor(again.rows, dtype=torch.float32)
        native.adamw_fields(
            together.ctypes.data, len(together), constants, dynamic_map(True), dynamic_map(False), again.seed
        )

    def run_in_pages(self, pages: native.PageTable, again: Again) -> native.PageReport:
        """One step of all slices, whose states are brought from a file and written back; they lie at address 0."""
        if self._base:
            raise ValueError(f"base: expected 0, where states are at offsets in their extents, got {self._base}")
        self._renew(again)
        constants = torch.tensor(again.rows, dtype=torch.float32)
        return native.adamw_pages(
            pages, self._fields.ctypes.data, len(self), constants, dynamic_map(True), dynamic_map(False), again.seed
        )

    def __len__(self) -> int:
        return len(self._fields)

    def _renew(self, again: Again) -> None:
        grads, index, steps = (np.array(v, dtype=np.int64) for v in (again.grads, again.index, again.steps))
        self._fields[:, _GRAD] = grads[self._owners] + self._offsets
        self._fields[:, _ROW] = index[self._owners]
        self._fields[:, _STEP] = steps[self._owners]


def _fields(s: Slice) -> list[int]:
    absmaxes = [0 if t is None else t.data_ptr() for t in (s.exp_avg_absmax, s.exp_avg_sq_absmax)]
    addresses = [t.data_ptr() for t in (s.param, s.grad, s.exp_avg, s.exp_avg_sq)]
    dtypes = [native.dtype_number(t.dtype) for t in (s.param, s.grad)]
    return [*addresses, *absmaxes, s.param.numel(), *dtypes, s.row, s.stream, s.step, s.first]
