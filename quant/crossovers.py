"""Where one route of an op beats another on a GPU: a table by chip, measured, with a default where it is not.

Every route gives right results at every shape, so an entry is a matter of speed alone. A measurement writes its
entries to a JSON file, {"NVIDIA H200": {"nf4_gemm_max_m": 192, ...}, ...}, which LORA_OPS_CROSSOVERS names.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


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
# By the name that torch.cuda.get_device_name gives. Nothing has been measured yet.
MEASURED: dict[str, Crossovers] = {}

_forced: list[dict[str, int]] = []


def crossovers(device: torch.device) -> Crossovers:
    """The table's entry for a device, after what `force` says."""
    entry = _entry(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEFAULT
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


def write(path: Path, device_name: str, entry: Crossovers) -> None:
    """Add a chip's measured entry to a JSON file, in the format that LORA_OPS_CROSSOVERS reads."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | {device_name: asdict(entry)}, indent=2) + "\n")


@functools.cache
def _entry(device_name: str) -> Crossovers:
    path = os.environ.get("LORA_OPS_CROSSOVERS")
    table = json.loads(Path(path).read_text()) if path else {}
    if device_name in table:
        return Crossovers(**table[device_name])
    return MEASURED.get(device_name, DEFAULT)
