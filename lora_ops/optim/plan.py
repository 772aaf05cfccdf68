"""What a step updates: a plan of slices, made once, and that of later steps too as long as only values change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lora_ops.kernels.adamw import Slice, SliceRow, SliceTable, StepValues
from lora_ops.optim.groups import FLOAT_DTYPES, dtype_names, group_constants
from lora_ops.optim.layout import Segment, States
from lora_ops.runtime.sharding import is_sharded, local, shard_number, sharded_as

_NO_VALUES = StepValues((), (), (), (), None)


class Member(NamedTuple):
    """A parameter of the groups as it was when the plan was made; grad_dtype is None if it had no gradient."""

    param: Tensor
    address: int
    numel: int
    grad_dtype: torch.dtype | None
    state: Any


class Plan:
    """Parameters with a gradient, the slices that they are updated in, and the values of the step under way.

    Args:
        groups, state: the optimizer's; the state of a parameter holds its step.
        seed: of stochastic rounding, or None.

    Attributes:
        indices: the parameters' numbers among all.
        slices: by extent, the (place in `indices`, segment) of what has its states there.
        extents, counts, bounds: of `slices`; how many slices each extent has, and from where to where among all.
        values: of the step under way.

    Raises:
        ValueError: if a gradient does not fit its parameter.
    """

    slices: Mapping[int, Sequence[tuple[int, Segment]]]
    extents: tuple[int, ...]
    counts: list[int]
    bounds: dict[int, tuple[int, int]]

    def __init__(self, groups: Sequence[dict[str, Any]], state: Any, seed: int | None) -> None:
        self.indices: list[int] = []
        self._params: list[Tensor] = []
        self._flat: list[tuple[Tensor, Tensor]] = []  # elements of parameters and gradients in a row
        self._streams: list[int] = []
        self._states: list[dict[str, Any]] = []
        self._groups: list[list[Member]] = []
        self._seed = seed
        self._reusable = True
        self._repeated = False
        self._table: SliceTable | None = None
        steps: list[int] = []
        row_of: list[int] = []
        rows: dict[tuple[int, int], int] = {}  # by group and step
        index = -1
        for number, group in enumerate(groups):
            self._groups.append([])
            for p in group["params"]:
                index += 1
                address = 0 if is_sharded(p) else p.data_ptr()
                grad_dtype, its_state = (None, state.get(p)) if p.grad is None else (p.grad.dtype, state[p])
                self._groups[-1].append(Member(p, address, p.numel(), grad_dtype, its_state))
                self._reusable &= not is_sharded(p)  # addresses are plain tensors'
                if p.grad is None:
                    continue
                grad, param = _flat(_local_grad(index, p)), _flat(local(p))
                if self._reusable:  # and of a copy they say nothing
                    self._reusable = (param.data_ptr(), grad.data_ptr()) == (address, p.grad.data_ptr())
                steps.append(its_state.get("step", 0) + 1)
                row_of.append(rows.setdefault((number, steps[-1]), len(rows)))
                self.indices.append(index)
                self._params.append(p)
                self._flat.append((param, grad))
                self._streams.append(index + (shard_number(p) << 20 if is_sharded(p) else 0))
                self._states.append(its_state)
        constants = [group_constants(step, groups[number]) for number, step in rows]
        self.values = StepValues([grad for _, grad in self._flat], steps, row_of, constants, seed)

    def lay_out(self, slices: Mapping[int, Sequence[tuple[int, Segment]]]) -> None:
        """Take the slices, by extent."""
        self.slices, self.extents = slices, tuple(slices)
        self.counts = [len(of_extent) for of_extent in slices.values()]
        ends = accumulate(self.counts)
        self.bounds = {e: (end - n, end) for e, n, end in zip(self.extents, self.counts, ends, strict=True)}

    def renew(self, groups: Sequence[dict[str, Any]], state: Any) -> bool:
        """Make it the plan of the next step; False if more changed than values, gradients' addresses, hyperparameters.

        A microsecond a tensor: this runs for every tensor of every step.
        """
        if not self._reusable or len(groups) != len(self._groups):
            return False
        grads, steps, row_of = [], [], []
        rows: dict[tuple[int, int], int] = {}
        strided = torch.strided
        for number, (group, members) in enumerate(zip(groups, self._groups, strict=True)):
            params, latest, row = group["params"], 0, 0
            if len(params) != len(members):
                return False
            for p, (known, address, numel, grad_dtype, its_state) in zip(params, members, strict=True):
                grad = p.grad
                if p is not known or (grad is None) != (grad_dtype is None) or state.get(p) is not its_state:
                    return False
                if grad is None:
                    continue
                if p.data_ptr() != address or p.numel() != numel or not p.is_contiguous():
                    return False
                if grad.dtype is not grad_dtype or grad.layout is not strided:
                    return False
                if grad.numel() != numel or not grad.is_contiguous():
                    return False
                step = its_state["step"] + 1
                if step != latest:
                    latest, row = step, rows.setdefault((number, step), len(rows))
                grads.append(grad)
                steps.append(step)
                row_of.append(row)
        constants = [group_constants(step, groups[number]) for number, step in rows]
        self.values = StepValues(grads, steps, row_of, constants, self._seed)
        self._repeated = True
        return True

    def slice(self, member: int, segment: Segment, states: States) -> Slice:
        """A slice with its tensors, for `adamw_`; most are whole parameters, of which no views are needed."""
        values = self.values
        if not self._flat:
            params = zip(self._params, values.grads, strict=True)
            self._flat = [(p.detach().view(-1), grad.detach().view(-1)) for p, grad in params]
        param, grad = self._flat[member]
        if segment.n != param.numel():
            elements = slice(segment.first, segment.first + segment.n)
            param, grad = param[elements], grad[elements]
        return Slice(
            param, grad, states.exp_avg, states.exp_avg_sq, states.exp_avg_absmax, states.exp_avg_sq_absmax,
            values.row_of[member], self._streams[member], values.steps[member], segment.first,
        )  # fmt: skip

    def table(self, places: Callable[[Segment], tuple[int, ...]]) -> SliceTable | None:
        """The slices laid out for the native kernel; None if the step has to go through `adamw_`, as the first one has.

        Args:
            places: where the states of a segment are: addresses, or offsets in its extent.
        """
        if not self._repeated or not SliceTable.serves():
            return None
        if self._table is None:
            if not all(p.is_cpu for p in self._params):
                return None
            rows = [
                SliceRow(member, self._params[member], self.values.grads[member].dtype, places(segment),
                         segment.first, segment.n, self._streams[member])
                for of_extent in self.slices.values() for member, segment in of_extent
            ]  # fmt: skip
            self._table = SliceTable(rows)
        return self._table

    def finish(self) -> None:
        """Write back parameters that were updated in a copy, count the step, and let go of the gradients."""
        if not self._reusable:
            for p, (param, _) in zip(self._params, self._flat, strict=True):
                own = local(p)
                if param.data_ptr() != own.data_ptr():
                    own.copy_(param.view(own.shape))
        for state, step in zip(self._states, self.values.steps, strict=True):
            state["step"] = step
        increment_version(self._params)
        self.values, self._flat = _NO_VALUES, []


def _flat(t: Tensor) -> Tensor:
    """The elements in a row: a view, or a copy if they are strided (of which reshape may still make a view)."""
    return t.detach().reshape(-1).contiguous()


def _local_grad(index: int, p: Tensor) -> Tensor:
    """The checked gradient; of a sharded parameter this rank's part of it."""
    grad = p.grad
    if grad is None or grad.is_sparse or grad.dtype not in FLOAT_DTYPES:
        kind = "none" if grad is None else "a sparse one" if grad.is_sparse else str(grad.dtype)
        raise ValueError(f"parameter {index}: expected a dense gradient of {dtype_names(FLOAT_DTYPES)}, got {kind}")
    if is_sharded(grad) != is_sharded(p):
        expected, got = ("a DTensor", "a plain tensor") if is_sharded(p) else ("a plain tensor", "a DTensor")
        raise ValueError(f"parameter {index}: expected {expected} as gradient, as the parameter is one, got {got}")
    return local(sharded_as(grad, p)) if is_sharded(p) else grad
