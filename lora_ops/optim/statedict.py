"""State dicts: torch.optim.AdamW's layout, and what is needed to load and save it from and to pages."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ops.optim.layout import BLOCK_SIZE, States
from lora_ops.optim.shards import own_part, shaped, state_shape
from lora_ops.paging.buffers import bytes_of, write_all
from lora_ops.paging.errors import PagingError


def entry(step: int, tensors: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """The state of one parameter; torch keeps the step in a tensor."""
    return {"step": torch.tensor(float(step)), **{name: shaped(name, t, param) for name, t in tensors.items()}}


def packed_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups with numbers, counted through all groups, in place of parameters."""
    packed, first = [], 0
    for group in groups:
        n = len(group["params"])
        packed.append({**group, "params": list(range(first, first + n))})
        first += n
    return packed


def check_keys(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless it looks like a state dict."""
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict: expected 'state' and 'param_groups', got no {', '.join(sorted(missing))}")


def matched_groups(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with our parameters and bits.

    Raises:
        ValueError: if numbers of groups or parameters differ, or the saved optimizer computed something else.
    """
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != saved_sizes:
        raise ValueError(f"state_dict: expected groups of {sizes} parameters, got {saved_sizes}")
    for i, (mine, its) in enumerate(zip(own, saved, strict=True)):
        names, saved_names = (list(group.get("param_names") or ()) for group in (mine, its))
        if names != saved_names and sorted(names) == sorted(saved_names):
            raise ValueError(
                f"state_dict: group {i}: expected the parameters {names}, got {saved_names}: states go by order, so "
                "give the optimizer the parameters in the order of the saved ones"
            )
    if any(group.get("amsgrad") for group in saved):
        raise ValueError("state_dict: amsgrad is not supported")
    if any(group.get("decoupled_weight_decay") is False and group.get("weight_decay") for group in saved):
        raise ValueError("state_dict: expected AdamW's weight decay, got Adam's, which is part of the gradient")
    kept = ("params", "param_names", "state_bits")
    return [
        {
            **mine,
            **{k: deepcopy(v) for k, v in its.items() if k not in kept},
            "betas": _tuple(its.get("betas", mine["betas"])),
        }
        for mine, its in zip(own, saved, strict=True)
    ]


def _tuple(betas: Any) -> Any:
    return tuple(betas) if isinstance(betas, list) else betas


class TensorSink:
    """Keeps references to the states: for an optimizer without pages, as torch does it."""

    def __init__(self) -> None:
        self._states: dict[int, States] = {}

    def write(self, index: int, first: int, states: States) -> None:
        """Note the states of a whole parameter."""
        self._states[index] = states

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a parameter, flat."""
        return self._states[index].tensors()


class FileBackedSink:
    """Collects the states in files that are deleted as soon as they are mapped.

    Args:
        folder: where, or None for where temporary files go; needs room for all states.
    """

    def __init__(self, folder: Path | None) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="state_dict-", dir=folder)
        except OSError as error:
            raise PagingError(f"{folder}: cannot save the state: {error.strerror}") from error
        self._parts: dict[int, dict[str, tuple[Path, torch.dtype, int]]] = defaultdict(dict)

    def write(self, index: int, first: int, states: States) -> None:
        """Append to the files of a parameter, at the place of its element `first`."""
        for name, t in states.tensors().items():
            path = Path(self._folder.name) / f"{index}.{name}"
            place = first // BLOCK_SIZE if name.endswith("absmax") else first
            try:
                with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
                    file.seek(place * t.element_size())
                    write_all(file, bytes_of(t))
            except OSError as error:
                raise PagingError(f"{path}: cannot save the state: {error.strerror}") from error
            size = max(place + t.numel(), self._parts[index].get(name, (path, t.dtype, 0))[2])
            self._parts[index][name] = path, t.dtype, size

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a parameter, flat; the files' names are gone afterwards."""
        found = {}
        for name, (path, dtype, size) in self._parts.pop(index).items():
            found[name] = (
                torch.from_file(str(path), shared=False, size=size, dtype=dtype)
                if size
                else torch.empty(0, dtype=dtype)
            )
            path.unlink()
        return found


class TensorSource:
    """States of a state dict, ours or torch.optim.AdamW's.

    Args:
        state_dict: `param_groups` tells the order of its entries.
        params: ours, in order.

    Raises:
        ValueError: if an entry does not fit its parameter.
    """

    def __init__(self, state_dict: dict[str, Any], params: Sequence[Tensor]) -> None:
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        if others := [i for i in state_dict["state"] if i not in set(saved_ids)]:
            raise ValueError(
                f"state_dict: expected states of parameters in param_groups, got some of {others[:3]} as well"
            )
        self._states: dict[int, States] = {}
        self.steps: dict[int, int] = {}
        for index, saved_id in enumerate(saved_ids):
            saved = state_dict["state"].get(saved_id)
            if saved:
                self._states[index] = _states_of(index, saved, params[index])
                self.steps[index] = _step(index, saved["step"])

    def states(self, index: int, first: int, n: int) -> States | None:
        """States of elements [first, first + n)."""
        found = self._states.get(index)
        if found is None:
            return None
        part = found.slice(first, n)
        return States(part.exp_avg.float(), part.exp_avg_sq.float()) if part.bits == 32 else part


def _states_of(index: int, saved: dict[str, Any], param: Tensor) -> States:
    missing = {"step", "exp_avg", "exp_avg_sq"} - saved.keys()
    if missing:
        raise ValueError(f"state_dict: parameter {index} has no {', '.join(sorted(missing))}; is it AdamW's?")
    coded = isinstance(saved["exp_avg"], Tensor) and saved["exp_avg"].dtype == torch.uint8
    names = States.names(8 if coded else 32)
    for name in names:
        if name not in saved:
            raise ValueError(f"state_dict: parameter {index} has 8-bit codes and no {name}")
        _check_part(f"state_dict: parameter {index}: {name}", saved[name], name, param, coded)
    try:
        return States(*(own_part(name, saved[name], param) for name in names))
    except ValueError as error:
        raise ValueError(f"state_dict: parameter {index}: {error}") from None


def _check_part(where: str, t: Any, name: str, param: Tensor, coded: bool) -> None:
    if not isinstance(t, Tensor) or t.is_meta:
        raise ValueError(
            f"{where}: expected a tensor with values, got {'one on meta' if isinstance(t, Tensor) else t!r}"
        )
    if (t.dtype != torch.uint8) if coded and not name.endswith("absmax") else not t.is_floating_point():
        raise ValueError(f"{where}: expected {'uint8' if coded else 'floating'} values, got {t.dtype}")
    expected = state_shape(name, param)
    if tuple(t.shape) != expected:
        blocks = "; 8-bit states load on as many ranks as they were saved on: save them with state_bits=32 for others"
        hint = blocks if name.endswith("absmax") and (t.dim() > 1 or len(expected) > 1) else ""
        raise ValueError(f"{where}: expected shape {expected}, got {tuple(t.shape)}{hint}")


def _step(index: int, step: Any) -> int:
    try:
        number = int(step)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = -1
    if number < 0:
        raise ValueError(f"state_dict: parameter {index}: step: expected a number of at least 0, got {step!r}")
    return number
