"""The adapter kernels of the native library: csrc/include/lora_ops.h."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

from lora_ops.quant.native_abi import WeightView
from lora_ops.runtime import native


class AdapterView(Structure):
    """`lora_ops_adapter`: pointers into tensors, which the caller keeps alive."""

    _fields_ = (
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("lora_a_dtype", c_int),
        ("lora_b_dtype", c_int),
        ("n", c_int64),
        ("k", c_int64),
        ("r", c_int64),
        ("scale", c_float),
        ("threshold", c_uint32),
        ("seed", c_uint64),
        ("offset", c_uint32),
    )


_LORA_FORWARD = native.Function(
    "lora_forward",
    *(POINTER(AdapterView), POINTER(WeightView), c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
    *(c_int, c_int),
)
_LORA_BACKWARD = native.Function(
    "lora_backward",
    *(POINTER(AdapterView), POINTER(WeightView), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
    *(c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int),
    argument="dy",
)
_DROPOUT_MASK = native.Function(
    "dropout_mask", c_uint64, c_uint32, c_uint32, c_int64, c_int64, c_int64, c_void_p, argument="rows"
)
# A layer's structures are the same in every call, and to make them takes a tenth of a small layer's time.
_same_adapter = functools.lru_cache(maxsize=1024)(AdapterView)


def adapter_view(
    lora_a: Tensor, lora_b: Tensor, scale: float, threshold: int = 0, seed: int = 0, offset: int = 0
) -> AdapterView:
    """The C view of an adapter: lora_a [R, K] and lora_b [N, R], both contiguous, and its dropout."""
    (n, r), k = lora_b.shape, lora_a.shape[1]
    pointers = (
        lora_a.data_ptr(),
        lora_b.data_ptr(),
        native.DTYPE_NUMBERS[lora_a.dtype],
        native.DTYPE_NUMBERS[lora_b.dtype],
    )
    if not threshold:
        return _same_adapter(*pointers, n, k, r, scale)
    return AdapterView(*pointers, n, k, r, scale, threshold, seed & (2**64 - 1), offset)


def forward(
    adapter: AdapterView, x: Tensor, s: Tensor, y: Tensor, weight: WeightView | None = None, bias: Tensor | None = None
) -> None:
    """s fp32 [M, R] = drop(x) Aᵀ and y [M, N] = x Wᵀ + bias + scale · s Bᵀ.

    Without a weight y holds x Wᵀ + bias already. x and y have unit stride along their last dimension.
    """
    _LORA_FORWARD(
        byref(adapter),
        None if weight is None else byref(weight),
        native.pointer(bias),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        s.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        native.DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )


def backward(
    adapter: AdapterView,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: WeightView | None = None,
    *,
    dx: Tensor | None = None,
    dlora_a: Tensor | None = None,
    dlora_b: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """With dS = scale · dY B: dx = dY W + drop(dS A), dlora_a = dSᵀ drop(x), dlora_b = scale · dYᵀ s, dbias = Σ_m dY.

    Without a weight dx holds dY W already. Outputs that are None are not computed. dy, x and dx have unit stride along
    their last dimension; the others are contiguous.
    """
    _LORA_BACKWARD(
        byref(adapter),
        None if weight is None else byref(weight),
        dy.data_ptr(),
        dy.shape[0],
        dy.stride(0),
        native.pointer(x),
        0 if x is None else x.stride(0),
        native.pointer(s),
        native.pointer(dx),
        0 if dx is None else dx.stride(0),
        native.pointer(dlora_a),
        native.pointer(dlora_b),
        native.pointer(dbias),
        native.DTYPE_NUMBERS[dy.dtype],
        torch.get_num_threads(),
    )


def dropout_mask(rows: slice, k: int, threshold: int, seed: int, offset: int, bits: Tensor) -> None:
    """Bits of the rows of a mask: bits uint8 [rows, ceil(k / 8)], the lowest bit of a byte first."""
    n_rows = rows.stop - rows.start
    _DROPOUT_MASK(seed & (2**64 - 1), offset, threshold, rows.start, n_rows, k, bits.data_ptr())
