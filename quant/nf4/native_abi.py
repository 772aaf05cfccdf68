"""The NF4 codec of the native library, and how it takes a weight: csrc/include/lora_ops.h."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.runtime import native


class NF4Weight(Structure):
    """`lora_ops_nf4_weight`: pointers into tensors, which the caller keeps alive."""

    _fields_ = (
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("absmax_codes", c_void_p),
        ("absmax_map", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_offset", c_float),
        ("block_size", c_int64),
    )
    view: Any = None  # what lora_ops.quant.native_abi makes of it


_QUANTIZE = native.Function("nf4_quantize", c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, argument="w")
_QUANTIZE_TRANSPOSED = native.Function(
    "nf4_quantize_transposed", c_void_p, c_int, *(c_int64,) * 3, c_void_p, c_void_p, c_int, argument="w"
)
_DEQUANTIZE = native.Function(
    "nf4_dequantize", POINTER(NF4Weight), c_int64, c_int64, c_void_p, c_int, c_int, argument="q"
)
_DEQUANTIZE_TRANSPOSED = native.Function(
    "nf4_dequantize_transposed", POINTER(NF4Weight), c_int64, c_int64, c_void_p, c_int, c_int, argument="q"
)
# A layer's structure is the same in every call, and to make it takes a tenth of a small layer's time.
_view = functools.lru_cache(maxsize=1024)(NF4Weight)


def code() -> tuple[float, ...]:
    """The NF4 code book as it stands in C++."""
    function = native.library().lora_ops_nf4_code
    function.restype = POINTER(c_float * 16)
    return tuple(function().contents)


def weight_of(q: NF4Tensor) -> NF4Weight:
    """The C view of `q`, valid while q lives."""
    if q.nested_absmax is None or q.nested_offset is None:
        return _view(q.packed.data_ptr(), q.absmax.data_ptr(), None, None, None, 0.0, q.block_size)
    pointers = (t.data_ptr() for t in (q.absmax, dynamic_map(signed=True), q.nested_absmax))
    return _view(q.packed.data_ptr(), None, *pointers, float(q.nested_offset), q.block_size)


def quantize(w: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize w [n] into packed uint8 [(n + 1) // 2] and absmax fp32 [ceil(n / block_size)]."""
    _QUANTIZE(
        w.data_ptr(),
        native.DTYPE_NUMBERS[w.dtype],
        w.numel(),
        block_size,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )


def quantize_transposed(w: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize a weight [N, K] that lies transposed in memory, w [K, N]."""
    k, n = w.shape
    _QUANTIZE_TRANSPOSED(
        w.data_ptr(),
        native.DTYPE_NUMBERS[w.dtype],
        n,
        k,
        block_size,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )


def dequantize(weight: NF4Weight, begin: int, end: int, out: Tensor) -> None:
    """Decode elements [begin, end) of the flat weight into out [end - begin]."""
    _DEQUANTIZE(byref(weight), begin, end, out.data_ptr(), native.DTYPE_NUMBERS[out.dtype], torch.get_num_threads())


def dequantize_transposed(weight: NF4Weight, out: Tensor) -> None:
    """Decode a weight [N, K] into its transpose out [K, N]."""
    k, n = out.shape
    _DEQUANTIZE_TRANSPOSED(
        byref(weight), n, k, out.data_ptr(), native.DTYPE_NUMBERS[out.dtype], torch.get_num_threads()
    )
