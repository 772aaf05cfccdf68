"""Which ops are registered, and which backends have a kernel for each: found in the tree, listed nowhere."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

import lora_ops.kernels
import lora_ops.quant
from lora_ops.runtime.backends import BACKENDS
from lora_ops.runtime.dispatch import Op


def registered_ops() -> Iterator[Op]:
    """Every op of every folder below kernels/ and quant/ that has an op.py."""
    for family in (lora_ops.kernels, lora_ops.quant):
        folders = pkgutil.walk_packages(family.__path__, f"{family.__name__}.")
        for name in sorted(info.name for info in folders if info.name.endswith(".op")):
            yield from (v for v in vars(importlib.import_module(name)).values() if isinstance(v, Op))


def backends_of(op: Op, device_type: str) -> dict[str, str | None]:
    """Backends that have a kernel for the op and serve the device: why each cannot run here, or None."""
    found: dict[str, str | None] = {}
    for backend in BACKENDS.values():
        if backend.device_types and device_type not in backend.device_types:
            continue
        if importlib.util.find_spec(f"{op.package}.{backend.module}") is None:
            continue
        if reason := backend.unavailable():
            found[backend.name] = reason  # not imported: its module may need what is missing
        elif op.name in importlib.import_module(f"{op.package}.{backend.module}").IMPLS:
            found[backend.name] = None
    return found
