"""Argument checks of the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for x's device; meta has none."""
    device_type = x.device.type  # torch 2.11 cannot compile torch.amp.is_autocast_available
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_dtype(name: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    check_tensor(name, t)
    if t.dtype not in allowed:
        names = ", ".join(dtype_name(d) for d in allowed)
        raise ValueError(f"{name}: expected dtype {names}, got {dtype_name(t.dtype)}")


def check_shape(name: str, t: Tensor, **dims: int) -> None:
    """Raise ValueError unless `t.shape` equals the named dimensions, in the order given."""
    if t.shape != tuple(dims.values()):
        want = ", ".join(f"{k}={v}" for k, v in dims.items())
        raise ValueError(f"{name}: expected ({want}), got {tuple(t.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given live on the device of the first one."""
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first_name, first = name, t.device
        elif t.device != first:
            raise ValueError(f"{name}: expected device {first} (that of {first_name}), got {t.device}")


def check_last_dim(name: str, t: Tensor, k: int) -> None:
    if t.dim() < 1 or t.shape[-1] != k:
        raise ValueError(f"{name}: expected (..., K={k}), got {tuple(t.shape)}")


def check_probability(name: str, p: float) -> None:
    if p is None or isinstance(p, (str, Tensor)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {p!r}")
