"""How Triton kernels are launched, and their launches recorded.

Every launcher calls `launch(kernel, grid, ...)`. While `record_launches()` is open the calls are recorded, and with
`run=False` not executed: tests/gpu_proof compiles exactly the signatures and configs that the real launchers produce.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_ops.runtime.checks import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of NVIDIA GPUs. What Triton compiles for 7.5 (T4, RTX 20) is right and has no matrix instructions: products run on the
# plain FMA units, in float16 as in float32. From 8.0 on it uses them, and the chip has those of bfloat16.
MIN_CAPABILITY, MATRIX_CAPABILITY = (7, 5), (8, 0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](*args, **meta)`; meta holds constexprs, num_warps and num_stages.

    `reaches` are tensors that are no arguments: their addresses stand in one.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    reaches: tuple[torch.Tensor, ...] = ()


@dataclass
class Recorder:
    """Launches in order; `run` says whether they were executed as well."""

    run: bool
    launches: list[Launch] = field(default_factory=list)


_recorders: list[Recorder] = []
_pretended: list[tuple[int, int]] = []
_under_way: list[Launch] = []  # what a kernel may touch, for the interpreter's checks


@contextmanager
def record_launches(*, run: bool = True) -> Iterator[Recorder]:
    """Record every launch while the context is open; with run=False nothing is executed and outputs stay unwritten."""
    recorder = Recorder(run)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        # By identity: two recorders opened around the same launches compare equal.
        _recorders[:] = [r for r in _recorders if r is not recorder]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel[grid](*args, **meta)`; an empty grid launches nothing.

    `reaches=tensors` names what the kernel touches through addresses that an argument holds; it is no argument itself.
    """
    reaches = tuple(meta.pop("reaches", ()))
    if 0 in grid:
        return
    call = Launch(kernel, grid, args, meta, reaches)
    for recorder in _recorders:
        recorder.launches.append(call)
    if not all(recorder.run for recorder in _recorders):
        return
    _under_way.append(call)
    try:
        _run(call)
    finally:
        _under_way.pop()


def launch_under_way() -> Launch | None:
    """The launch whose kernel runs in the interpreter just now."""
    return _under_way[-1] if _under_way else None


def _run(call: Launch) -> None:
    kernel, grid, args = call.kernel, call.grid, call.args
    meta = known_options(call.meta, amd=torch.version.hip is not None)
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the operands are
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def known_options(meta: dict[str, Any], *, amd: bool) -> dict[str, Any]:
    """The launch options that the vendor's compiler has: AMD's refuses maxnreg."""
    return {name: value for name, value in meta.items() if name != "maxnreg"} if amd else meta


def _dot(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextmanager
def pretend_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Launch as on an NVIDIA GPU of this compute capability while the context is open: for tests/gpu_proof."""
    _pretended.append(capability)
    try:
        yield
    finally:
        _pretended.pop()


@functools.cache
def _capability_of(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU its compute capability; of what is none, that of one which lacks nothing."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else MATRIX_CAPABILITY


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, or (8, 0) where there is no such thing."""
    return _pretended[-1] if _pretended else _capability_of(device)


def on_fma_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype run on the plain FMA units, with their operands in registers: small tiles.

    float32 on every chip, since TF32 would not keep its accuracy; 16 bits on one without matrix instructions.
    """
    return dtype == torch.float32 or capability(device) < MATRIX_CAPABILITY


def declines(device: torch.device, dtype: torch.dtype, *, products: bool = False) -> str | None:
    """Why Triton kernels cannot take activations of this device and dtype, or None; for an op's `declines`.

    Args:
        products: the op multiplies matrices of this dtype.
    """
    if dtype not in DTYPES:
        return f"triton kernels have no {dtype_name(dtype)}"
    has = capability(device)
    if has < MIN_CAPABILITY:
        return f"triton kernels need compute capability {_dot(MIN_CAPABILITY)}, this GPU has {_dot(has)}"
    if products and dtype == torch.bfloat16 and has < MATRIX_CAPABILITY:
        return (
            f"products in bfloat16 need compute capability {_dot(MATRIX_CAPABILITY)}, this GPU has {_dot(has)}: "
            "load the model with dtype=torch.float16, or train with fp16=True"
        )
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"triton kernels run on cuda, not on {device.type}"
