"""NF4 weights as the native library takes them: csrc/include/lora_ops.h."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p

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

    @functools.cached_property
    def operand(self) -> WeightView:
        """It as kernels take it that have dense weights too."""
        return WeightView(nf4=self)


class WeightView(Structure):
    """`lora_ops_weight`: a pointer into a tensor, which the caller keeps alive, or an NF4 weight."""

    _fields_ = (("dense", c_void_p), ("stride", c_int64), ("transposed", c_int), ("nf4", NF4Weight))


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
_NKXM_STRIDE = c_int64, c_int64, c_void_p, c_int64, c_int64  # n, k, x, m, stride_x
_LINEAR = native.Function("nf4_linear", POINTER(NF4Weight), *_NKXM_STRIDE, c_void_p, c_void_p, c_int64, c_int, c_int)
_LINEAR_DX = native.Function(
    "nf4_linear_dx", POINTER(NF4Weight), *_NKXM_STRIDE, c_void_p, c_int64, c_int, c_int, argument="dy"
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


def linear(weight: NF4Weight, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = x [M, K] Wᵀ + bias [N]; x and y have unit stride along their last dimension."""
    _LINEAR(
        byref(weight),
        y.shape[1],
        x.shape[1],
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        native.DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )


def linear_dx(weight: NF4Weight, dy: Tensor, dx: Tensor) -> None:
    """dx [M, K] = dy [M, N] W; dy and dx have unit stride along their last dimension."""
    _LINEAR_DX(
        byref(weight),
        dy.shape[1],
        dx.shape[1],
        dy.data_ptr(),
        dy.shape[0],
        dy.stride(0),
        dx.data_ptr(),
        dx.stride(0),
        native.DTYPE_NUMBERS[dy.dtype],
        torch.get_num_threads(),
    )
