"""The backends that ops run on, and which one is asked for."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_ops.runtime import cuda, native

_chosen: list[str] = []  # by `use_backend`, innermost last; process-wide as traces are


@dataclass(frozen=True)
class Backend:
    """A way to run ops: `module` is the file in an op's folder, `unavailable` says why it cannot run here, or None.

    `cost` tells somebody on such a device what its absence means. One that is not `automatic` serves only where it is
    asked for by name.
    """

    name: str
    module: str
    device_types: tuple[str, ...]  # empty: every device
    unavailable: Callable[[], str | None]
    cost: str = ""
    automatic: bool = True


@functools.cache
def _triton_unavailable() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


# In order of preference. Adding a backend is one line here and one file in each op's folder that it serves.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "cuda",
            "cuda_impl",
            ("cuda",),
            cuda.unavailable_reason,
            cost="nothing: the Triton kernels serve instead",
            automatic=False,  # until a GPU has verified and timed it
        ),
        Backend(
            "triton",
            "triton_impl",
            ("cuda",),
            _triton_unavailable,
            cost="GPU ops fall back to plain PyTorch: pip install 'lora_ops[triton]'",
        ),
        Backend(
            "native",
            "native_impl",
            ("cpu",),
            native.unavailable_reason,
            cost="CPU ops fall back to plain PyTorch and run several times slower (`make bench` measures it)",
        ),
        Backend("reference", "reference", (), lambda: None),
    )
}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _check_backend_name(source: str, name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join([*BACKENDS, 'auto'])}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on the backend `name` while the context is open, in the whole process.

    An op that the backend cannot serve raises `BackendError` with the reason; "auto" restores the choice by device,
    dtype and shape. Without a context the environment variable LORA_OPS_BACKEND decides, "auto" by default.

    Args:
        name: of `BACKENDS`, or "auto".

    Raises:
        ValueError: if there is no backend of that name.
    """
    _check_backend_name("use_backend", name)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def current_backend() -> str:
    """The backend asked for: by the innermost `use_backend`, else by LORA_OPS_BACKEND, else "auto"."""
    return _chosen[-1] if _chosen else _backend_of_environment()


@functools.cache
def _backend_of_environment() -> str:
    """LORA_OPS_BACKEND, read once: a lookup that fails takes 1 µs, of 20 for a small layer."""
    return _check_backend_name("LORA_OPS_BACKEND", os.environ.get("LORA_OPS_BACKEND", "auto"))
