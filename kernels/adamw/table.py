"""A step of the same slices again: laid out once for the native kernel, so that a tensor costs a microsecond."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_ops import _native
from lora_ops._dispatch import current_backend, tracing
from lora_ops.kernels.adamw.op import Slice
from lora_ops.quant.blockwise8.reference import dynamic_map

_GRAD, _ROW, _STEP = 1, 9, 11  # fields of lora_ops_adamw_slice, 64 bits each


class Table:
    """`adamw_` of slices that it has served before; their tensors are kept.

    Args:
        slices: on the CPU, checked by `adamw_`.
    """

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._slices = [s for s in slices if s.param.numel()]
        self._kept = np.array([bool(s.param.numel()) for s in slices], dtype=bool)
        self._fields = np.array([_fields(s) for s in self._slices], dtype=np.int64).reshape(-1, 13)
        for s in self._slices:
            s.grad = s.param  # the gradient is not kept: every step brings another

    @staticmethod
    def serves() -> bool:
        """Whether `adamw_` would run on the native backend and nobody records what runs."""
        return current_backend() in ("auto", "native") and not tracing() and _native.available()

    def run(
        self,
        grads: Sequence[int],
        index: Sequence[int],
        steps: Sequence[int],
        rows: Sequence[tuple[float, ...]],
        seed: int | None,
    ) -> None:
        """One step.

        Args:
            grads: addresses of the gradients, contiguous and of the dtypes that they had.
            index: rows of `rows` that hold for the slices. steps: of the slices.
        """
        for column, values in ((_GRAD, grads), (_ROW, index), (_STEP, steps)):
            self._fields[:, column] = np.array(values, dtype=np.int64)[self._kept]
        constants = torch.tensor(rows, dtype=torch.float32)
        _native.adamw_fields(
            self._fields.ctypes.data, len(self._fields), constants, dynamic_map(True), dynamic_map(False), seed
        )


def _fields(s: Slice) -> list[int]:
    absmaxes = [0 if t is None else t.data_ptr() for t in (s.exp_avg_absmax, s.exp_avg_sq_absmax)]
    addresses = [t.data_ptr() for t in (s.param, s.grad, s.exp_avg, s.exp_avg_sq)]
    dtypes = [_native.dtype_number(t.dtype) for t in (s.param, s.grad)]
    return [*addresses, *absmaxes, s.param.numel(), *dtypes, s.row, s.stream, s.step, s.first]
