"""Loads the library of CUDA C++ kernels (csrc/cuda) and calls its C ABI; see csrc/include/lora_ops_cuda.h.

The library is built on request only, and serves only where the backend "cuda" is asked for by name: no GPU has verified
and timed it yet. Wrappers take tensors that the public functions have checked, and turn status codes into errors.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from lora_ops.runtime.native import DTYPE_NUMBERS

ABI_VERSION = 1
LIBRARY_PATH = Path(__file__).parents[1] / "_liblora_ops_cuda.so"
BUILD_HINT = "with nvcc of CUDA 12.8 or newer, `make cuda` or LORA_OPS_BUILD_CUDA=1 pip install builds it"
_CUDA_ERROR = 1000


class NF4Weight(Structure):
    """`lora_ops_cuda_nf4_weight`: pointers into tensors, which the caller keeps alive."""

    _fields_ = (
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("absmax_codes", c_void_p),
        ("absmax_map", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_offset", c_void_p),
        ("block_size", c_int64),
    )


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lora_ops_cuda_nf4_linear": (
        *(POINTER(NF4Weight), c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int, c_void_p),
    ),
}


class CudaError(RuntimeError):
    """The library of CUDA kernels is missing, does not fit this package, or could not launch."""


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path`, with its signatures. Raises CudaError with the reason if it does not serve."""
    if not path.exists():
        raise CudaError(f"the CUDA C++ kernels were not built: {BUILD_HINT}")
    try:
        lib = ctypes.CDLL(str(path))
        version = lib.lora_ops_cuda_abi_version()
        if version != ABI_VERSION:
            raise CudaError(f"{path.name} has ABI version {version}, expected {ABI_VERSION}: {BUILD_HINT}")
        for name, argtypes in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = argtypes
            function.restype = c_int
    except (OSError, AttributeError) as error:
        raise CudaError(f"{path.name} cannot be loaded ({error}): {BUILD_HINT}") from error
    return lib


@functools.cache
def _load() -> ctypes.CDLL | CudaError:
    try:
        return open_library(LIBRARY_PATH)
    except CudaError as error:
        return error


def reload() -> None:
    """Look for the library again, once it has been built."""
    _load.cache_clear()


def library() -> ctypes.CDLL:
    """The loaded library. Raises CudaError with the reason if there is none."""
    lib = _load()
    if isinstance(lib, CudaError):
        raise lib
    return lib


def unavailable_reason() -> str | None:
    """Why the backend cannot be used here, or None."""
    lib = _load()
    return str(lib) if isinstance(lib, CudaError) else None


def _check(status: int, function: str) -> None:
    if status >= _CUDA_ERROR:
        raise CudaError(f"{function}: the launch failed with CUDA error {status - _CUDA_ERROR}")
    if status:
        raise CudaError(f"{function}: refused its arguments (status {status})")


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def nf4_linear(weight: NF4Weight, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = x [M, K] Wᵀ + bias [N] on the current stream; x has unit stride along K, y and bias are contiguous."""
    status = library().lora_ops_cuda_nf4_linear(
        byref(weight),
        y.shape[1],
        x.shape[1],
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        DTYPE_NUMBERS[x.dtype],
        _stream(x.device),
    )
    _check(status, "nf4_linear")
