"""8-bit blockwise codes: schemas, shape rules and the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ops.runtime.checks import check_dtype, check_shape
from lora_ops.runtime.dispatch import Op

_quantize = Op(
    "quantize_blockwise8(Tensor x, int block_size, bool signed) -> (Tensor codes, Tensor absmax)", __package__
)
_dequantize = Op(
    "dequantize_blockwise8(Tensor codes, Tensor absmax, int block_size, bool signed) -> Tensor", __package__
)


@_quantize.kernel
def _(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    return _quantize.run(x, x=x, block_size=block_size, signed=signed)


@_quantize.fake
def _(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(((x.numel() + block_size - 1) // block_size,))


@_dequantize.kernel
def _(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    return _dequantize.run(codes, codes=codes, absmax=absmax, block_size=block_size, signed=signed)


@_dequantize.fake
def _(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    return absmax.new_empty(codes.shape)


_quantize.not_differentiable()
_dequantize.not_differentiable()


def quantize_blockwise8(x: Tensor, *, block_size: int = 256, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantize a tensor to 8 bits with the dynamic map, to the exactly nearest code (a tie takes the lower one).

    For each block of `block_size` elements: absmax = max |x|, code(e) = argmin_c |x[e] / absmax - map[c]|.

    Args:
        x: float32, any shape, finite.
        block_size: elements that share one absmax, at least 1.
        signed: the signed map (-1 … 1) or the unsigned one (0 … 1) with twice the resolution.

    Returns:
        codes uint8 of x.shape and absmax float32 [ceil(n / block_size)].

    Raises:
        TypeError, ValueError: if x is not a finite float32 tensor or block_size is not positive.

    Source: 8-bit Approximations for Parallelism in Deep Learning (Dettmers 2015), section 2.
    """
    check_dtype("x", x, (torch.float32,))
    _check_block_size(block_size)
    return torch.ops.lora_ops.quantize_blockwise8(x.detach(), block_size, signed)


def dequantize_blockwise8(codes: Tensor, absmax: Tensor, *, block_size: int = 256, signed: bool = True) -> Tensor:
    """The values of 8-bit blockwise codes: map[code] · absmax[e // block_size], in float32.

    Args:
        codes: uint8, any shape.
        absmax: float32 [ceil(n / block_size)].
        block_size, signed: as they were quantized.

    Returns:
        float32 of codes.shape.

    Raises:
        TypeError, ValueError: if a dtype or shape does not fit.
    """
    check_dtype("codes", codes, (torch.uint8,))
    check_dtype("absmax", absmax, (torch.float32,))
    _check_block_size(block_size)
    check_shape("absmax", absmax, n_blocks=-(-codes.numel() // block_size))
    return torch.ops.lora_ops.dequantize_blockwise8(codes, absmax, block_size, signed)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive integer, got {block_size}")
