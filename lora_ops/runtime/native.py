"""Loads the native library (csrc/), whose functions are declared beside their ops; see csrc/include/lora_ops.h.

ctypes releases the GIL while the library runs. The environment variable LORA_OPS_ISA forces an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int
from pathlib import Path
from typing import Any

# torch comes first: the library then uses the OpenMP runtime, and so the threads, that torch has loaded.
import torch
from torch import Tensor

from lora_ops.runtime.checks import dtype_name

ABI_VERSION = 5
LIBRARY_PATH = Path(__file__).parents[1] / "_liblora_ops.so"
BUILD_HINT = "reinstall lora_ops with a C++17 compiler; `lora-ops doctor` says how"
REMEDY = (
    "apt-get install g++ (or dnf install gcc-c++, xcode-select --install), then LORA_OPS_REQUIRE_NATIVE=1 pip install "
    "--force-reinstall --no-deps --no-cache-dir of lora_ops: pip keeps what it built without a compiler"
)
OPENMP_HINT = "apt-get install libgomp1 (or dnf install libgomp); torch's wheels for Linux bring it"

ISAS: dict[str, int] = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "neon": 4, "neon_bf16": 5}
_ISA_AUTO = -1
_NONFINITE = 2
DTYPE_NUMBERS: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # lora_ops_dtype
FLOAT_DTYPES = tuple(DTYPE_NUMBERS)


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lora_ops_get_isa": (),
    "lora_ops_supports_isa": (c_int,),
    "lora_ops_force_isa": (c_int,),
}


class NativeError(RuntimeError):
    """The native library is missing, does not fit this package, or refused its arguments."""


def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise NativeError(f"the native library was not built: {BUILD_HINT}")
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.lora_ops_abi_version()
        if version != ABI_VERSION:
            raise NativeError(f"{path.name} has ABI version {version}, expected {ABI_VERSION}: {BUILD_HINT}")
        for name, argtypes in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = argtypes
            function.restype = c_int
    except (OSError, AttributeError) as error:
        hint = OPENMP_HINT if "libgomp" in str(error) else BUILD_HINT
        raise NativeError(f"{path.name} cannot be loaded ({error}): {hint}") from error
    if forced := os.environ.get("LORA_OPS_ISA"):
        _force(lib, forced)
    return lib


def _force(lib: ctypes.CDLL, name: str) -> None:
    supported = _supported(lib)
    if name not in supported:
        raise NativeError(f"instruction set: this machine has {', '.join(supported)}; {name!r} was asked for")
    lib.lora_ops_force_isa(ISAS[name])


def _supported(lib: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for name, number in ISAS.items() if lib.lora_ops_supports_isa(number))


@functools.cache
def _load() -> ctypes.CDLL | NativeError:
    try:
        return _open(LIBRARY_PATH)
    except NativeError as error:
        return error


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeError with the reason if there is none."""
    lib = _load()
    if isinstance(lib, NativeError):
        raise lib
    return lib


def declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native kernels cannot take activations of this device and dtype, or None; for an op's `declines`."""
    if device.type != "cpu":
        return f"native kernels run on cpu, not on {device.type}"
    return None if dtype in DTYPE_NUMBERS else f"native kernels have no {dtype_name(dtype)}"


@functools.cache
def unavailable_reason() -> str | None:
    """Why the native backend cannot be used here, or None."""
    lib = _load()
    return str(lib) if isinstance(lib, NativeError) else None


def available() -> bool:
    """Whether the native backend can be used here."""
    return unavailable_reason() is None


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine and the library have, slowest first."""
    return _supported(library())


def isa() -> str:
    """The instruction set in use."""
    number = library().lora_ops_get_isa()
    return next(name for name, value in ISAS.items() if value == number)


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set, in the whole process, inside the `with` block."""
    lib = library()
    before = isa()
    _force(lib, name)
    try:
        yield
    finally:
        lib.lora_ops_force_isa(ISAS[before])


class Function:
    """A function of the library that answers a status, declared beside the op that calls it.

    Args:
        name: without the prefix lora_ops_.
        argtypes: its signature.
        argument: the caller's name of the tensor that must be finite.
    """

    def __init__(self, name: str, *argtypes: type, argument: str = "x") -> None:
        self.name, self.argtypes, self.argument = name, argtypes, argument
        self._function: Any = None

    def _find(self) -> Any:
        function = getattr(library(), f"lora_ops_{self.name}")
        function.argtypes, function.restype = self.argtypes, c_int
        self._function = function
        return function

    def ask(self, *args: Any) -> int:
        """Call it; its answer, whatever it means."""
        return (self._function or self._find())(*args)

    def __call__(self, *args: Any) -> None:
        """Call it with tensors that the public functions have checked. A status is an error."""
        if status := (self._function or self._find())(*args):
            self.check(status)

    def check(self, status: int) -> None:
        """Raise what a status means."""
        if status == _NONFINITE:
            raise ValueError(f"{self.argument}: expected finite values, got inf or NaN")
        if status:
            raise NativeError(f"{self.name}: refused its arguments (status {status})")


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
