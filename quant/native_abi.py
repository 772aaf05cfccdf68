"""Products with a frozen weight in the native library, and how it takes one: csrc/include/lora_ops.h."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.linear.reference import as_matrix
from lora_ops.quant.nf4.native_abi import NF4Weight, weight_of
from lora_ops.runtime import native


class WeightView(Structure):
    """`lora_ops_weight`: a pointer into a tensor, which the caller keeps alive, or an NF4 weight."""

    _fields_ = (("dense", c_void_p), ("stride", c_int64), ("transposed", c_int), ("nf4", NF4Weight))


_NKXM_STRIDE = c_int64, c_int64, c_void_p, c_int64, c_int64  # n, k, x, m, stride_x
_LINEAR = native.Function("linear", POINTER(WeightView), *_NKXM_STRIDE, c_void_p, c_void_p, c_int64, c_int, c_int)
_LINEAR_DX = native.Function(
    "linear_dx", POINTER(WeightView), *_NKXM_STRIDE, c_void_p, c_int64, c_int, c_int, argument="dy"
)
_LEAST_SIDE = 32  # of a weight: a head of few outputs or a product of few terms fills no tile
_TAKES_DENSE = native.Function("takes_dense", c_int)


# A layer's structure is the same in every call.
_same_view = functools.lru_cache(maxsize=1024)(WeightView)


def nf4_view(q: NF4Tensor) -> WeightView:
    """The C view of an NF4 weight, valid while it lives."""
    nf4 = weight_of(q)
    if nf4.view is None:  # kept with the structure, which is the same in every call
        nf4.view = WeightView(nf4=nf4)
    return nf4.view


def dense_view(weight: Tensor) -> WeightView:
    """The C view of a dense weight [N, K] with unit stride along K, or along N as a Conv1D's has."""
    by_rows = weight.stride(1) == 1
    return _same_view(weight.data_ptr(), weight.stride(0 if by_rows else 1), not by_rows)


def weight_view(weight: Tensor | NF4Tensor) -> WeightView | None:
    """The weight as the library multiplies it, or None where torch does."""
    if isinstance(weight, NF4Tensor):
        return nf4_view(weight)
    return dense_view(weight) if takes_dense(weight) else None


def takes_dense(weight: Tensor) -> bool:
    """Whether the library can multiply a dense weight [N, K], and faster than torch does here."""
    return (
        min(weight.shape) >= _LEAST_SIDE
        and 1 in weight.stride()
        and bool(_TAKES_DENSE.ask(native.DTYPE_NUMBERS[weight.dtype]))
    )


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with unit stride along K, a view where x's strides allow it."""
    if x.dim() != 2:  # a reshape that changes nothing takes 1 µs, of 200 for a layer in generation
        x = as_matrix(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def linear(weight: WeightView, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
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


def linear_dx(weight: WeightView, dy: Tensor, dx: Tensor) -> None:
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
