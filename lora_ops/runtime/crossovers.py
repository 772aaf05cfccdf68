"""Where one route of an op beats another on a GPU: a table by chip, measured, with a default where it is not.

Every route gives right results at every shape, so an entry is a matter of speed alone. `python3 -m bench.gpu --tune`
measures this machine's and writes it to a JSON file, {"NVIDIA H200": {"nf4_gemm_max_m": 192, ...}, ...}, which is read
from then on: `table_path()`.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_ops.runtime.triton_launch import on_fma_units


@dataclass(frozen=True)
class Crossovers:
    """What decides between routes.

    Attributes:
        nf4_gemv_max_m: tokens up to which nf4_linear multiplies without a matrix instruction (its kernel takes 4).
        nf4_gemm_max_m: tokens up to which it decodes W inside the GEMM; beyond, it decodes to a temporary for cuBLAS.
        kstep_min_m: tokens from which lora_linear runs its own GEMM, with the low-rank term as one more K-step;
            below, the low-rank term is written first and cuBLAS adds to it (β = 1).
    """

    nf4_gemv_max_m: int = 4
    nf4_gemm_max_m: int = 256
    kstep_min_m: int = 2**62  # never: unmeasured, and cuBLAS is hard to match


DEFAULT = Crossovers()
# Where 16-bit products run on FMA units (compute capability 7.5). A T4 decodes W to a temporary in 14 ps a weight, by
# its bytes at 320 GB/s; a GEMM on FMA units at half of 8.1 TFLOP/s takes as long for 28 tokens. Arithmetic, unmeasured.
DEFAULT_ON_FMA_UNITS = Crossovers(nf4_gemm_max_m=32)
# By the name that torch.cuda.get_device_name gives. Nothing has been measured yet.
MEASURED: dict[str, Crossovers] = {}

_forced: list[dict[str, int]] = []


def crossovers(device: torch.device) -> Crossovers:
    """The table's entry for a device, after what `force` says."""
    entry = of(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEFAULT
    if entry is DEFAULT and on_fma_units(device, torch.float16):
        entry = DEFAULT_ON_FMA_UNITS
    for changes in _forced:
        entry = replace(entry, **changes)
    return entry


@contextmanager
def force(**changes: int) -> Iterator[None]:
    """Override fields of Crossovers in the whole process while the context is open: `force(kstep_min_m=0)`."""
    replace(DEFAULT, **changes)  # a TypeError names a field that does not exist
    _forced.append(changes)
    try:
        yield
    finally:
        _forced.remove(changes)


def table_path() -> Path:
    """The file of entries measured here: LORA_OPS_CROSSOVERS, or lora_ops/crossovers.json in the user's cache."""
    if path := os.environ.get("LORA_OPS_CROSSOVERS"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "lora_ops" / "crossovers.json"


def write(path: Path, device_name: str, entry: Crossovers) -> None:
    """Add a chip's measured entry to a file of the kind that `table_path` names; the other chips' stay."""
    table = _read(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(table | {device_name: asdict(entry)}, indent=2) + "\n")
    os.replace(beside, path)  # a reader never sees half a table
    _lookup.cache_clear()


def of(device_name: str) -> Crossovers:
    """A chip's entry."""
    return _lookup(device_name)[0]


def source(device_name: str) -> str:
    """Where a chip's entry comes from, in words."""
    return _lookup(device_name)[1]


def _read(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text())
    if not isinstance(table, dict):
        raise ValueError(f"expected a JSON object of chips, got {type(table).__name__}")
    return table


def _parse(entry: dict[str, Any]) -> Crossovers:
    if wrong := [name for name, value in entry.items() if not isinstance(value, int)]:
        raise ValueError(f"{wrong[0]}: expected a number of tokens, got {entry[wrong[0]]!r}")
    return Crossovers(**entry)  # a TypeError names a field that does not exist


@functools.cache
def _lookup(device_name: str) -> tuple[Crossovers, str]:
    """A chip's entry and where it comes from; a file that cannot be used is told once and costs speed, not results."""
    path = table_path()
    try:
        # A file that was named must be there; the one in the cache need not.
        table = _read(path) if path.exists() or os.environ.get("LORA_OPS_CROSSOVERS") else {}
        if device_name in table:
            return _parse(table[device_name]), f"a measurement on this machine, {path}"
    except (OSError, TypeError, ValueError) as error:
        warnings.warn(f"lora_ops: crossovers are not read from {path}: {error}", stacklevel=2)
    if device_name in MEASURED:
        return MEASURED[device_name], "a measurement on such a chip"
    return DEFAULT, "defaults that were not measured on this chip"
