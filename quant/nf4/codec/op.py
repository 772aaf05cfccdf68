"""The NF4 codec: schemas, shape rules and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8 import quantize_blockwise8
from lora_ops.quant.frozen import OPERANDS_SCHEMA, from_operands, operands
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, check_block_size, check_nf4
from lora_ops.runtime.checks import check_dtype
from lora_ops.runtime.dispatch import Op

QUANTIZE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEQUANTIZE_DTYPES = (*QUANTIZE_DTYPES, torch.float64)

_quantize = Op("quantize_nf4(Tensor w, int block_size) -> (Tensor packed, Tensor absmax)", __package__)
_dequantize = Op(f"dequantize_nf4({OPERANDS_SCHEMA}, ScalarType dtype) -> Tensor", __package__)
_dequantize_out = Op(f"dequantize_nf4_out({OPERANDS_SCHEMA}, Tensor(a!) out) -> ()", __package__)


@_quantize.kernel
def _(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _quantize.run(w, w=w, block_size=block_size)


@_quantize.fake
def _(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    packed = w.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, w.new_empty(((n + block_size - 1) // block_size,), dtype=torch.float32)


@_dequantize.kernel
def _(*args: Any) -> Tensor:
    *parts, dtype = args
    return _dequantize.run(args[0], q=from_operands(dtype, *parts), dtype=dtype)


@_dequantize.fake
def _(packed: Tensor, *args: Any) -> Tensor:
    *_, shape, _, dtype = args
    return packed.new_empty(shape, dtype=dtype)


@_dequantize_out.kernel
def _(*args: Any) -> None:
    *parts, out = args
    _dequantize_out.run(args[0], q=from_operands(out.dtype, *parts), out=out)


@_dequantize_out.fake
def _(*args: Any) -> None:
    return None


def quantize_nf4(w: Tensor, *, block_size: int = 64, double_quant: bool = False) -> NF4Tensor:
    """Quantize a tensor to 4-bit NormalFloat.

    For each block of `block_size` elements of the row-major tensor:
    absmax = max |w|, code(e) = number of thresholds that w[e] / absmax exceeds.
    With `double_quant`, absmax - mean(absmax) is itself quantized to 8 bits in blocks of 256.

    Args:
        w: any shape; float32, bfloat16 or float16; finite. Not differentiated.
        block_size: elements that share one absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: quantize absmax as well: 4.127 instead of 4.5 bits an element at block_size 64.

    Returns:
        An NF4Tensor whose bytes equal those of bitsandbytes' `quantize_4bit(..., quant_type="nf4")`.

    Raises:
        TypeError, ValueError: if w is not a floating tensor or holds inf or NaN, or block_size is not in the list.

    Source: QLoRA (Dettmers et al. 2023), section 3.
    """
    check_dtype("w", w, QUANTIZE_DTYPES)
    check_block_size(block_size)
    w = w.detach()
    packed, absmax = torch.ops.lora_ops.quantize_nf4(w, block_size)
    if not double_quant:
        return NF4Tensor(packed, absmax, tuple(w.shape), w.dtype, block_size)
    # An empty tensor has no mean; bitsandbytes cannot double-quantize one at all.
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, nested_absmax = quantize_blockwise8(absmax - offset, block_size=NESTED_BLOCK_SIZE, signed=True)
    return NF4Tensor(packed, codes, tuple(w.shape), w.dtype, block_size, nested_absmax, offset)


def dequantize_nf4(q: NF4Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The values of an NF4 tensor: value[e] = NF4_CODE[code e] · absmax[e // block_size].

    The product is taken in float32 and rounded once, to nearest even, to the dtype of the result.

    Args:
        q: the quantized tensor.
        dtype: of the result: float32, bfloat16, float16 or float64; q.dtype if None, or that of `out`.
        out: tensor of q.shape to write into, on q's device: contiguous, or, of two dimensions, with a contiguous
            transpose: `out=buffer.t()` leaves Wᵀ in a contiguous buffer [K, N] of a q of shape (N, K).

    Returns:
        A tensor of q.shape, `out` if it was given.

    Raises:
        TypeError, ValueError: if q's parts do not fit each other, dtype is not in the list, or out does not fit.
    """
    check_nf4("q", q)
    if dtype is None:
        dtype = q.dtype if out is None else out.dtype
    if dtype not in DEQUANTIZE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DEQUANTIZE_DTYPES))}, got {dtype}")
    if out is None:
        return torch.ops.lora_ops.dequantize_nf4(*operands(q), dtype)
    check_dtype("out", out, (dtype,))
    is_dense = out.is_contiguous() or (out.dim() == 2 and out.t().is_contiguous())
    if tuple(out.shape) != tuple(q.shape) or not is_dense or out.device != q.device:
        raise ValueError(
            f"out: expected a tensor of shape {tuple(q.shape)} on {q.device}, contiguous or the transpose of a "
            f"contiguous matrix, got {tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )
    torch.ops.lora_ops.dequantize_nf4_out(*operands(q), out)
    return out
