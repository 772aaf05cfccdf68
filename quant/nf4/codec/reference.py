"""The NF4 codec in plain PyTorch: the meaning of the format, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import MIN_ABSMAX, dequantize_blockwise8, scaled
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, nf4_code, nf4_thresholds

CHUNK = 1 << 20  # elements decoded or encoded at a time, a multiple of every block size: bounds the temporaries


def quantize_nf4(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """packed uint8 [(n + 1) // 2, 1] and absmax fp32 [ceil(n / block_size)]."""
    flat = w.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    thresholds = nf4_thresholds(w.device)
    for begin in range(0, n, CHUNK):
        end = min(begin + CHUNK, n)
        v, chunk_absmax = scaled(flat[begin:end].float(), block_size)
        absmax[begin // block_size : -(-end // block_size)] = chunk_absmax
        if v.numel() % 2:
            v = torch.cat([v, v.new_zeros(1)])  # the padding nibble codes zero
        codes = torch.bucketize(v, thresholds, out_int32=True).to(torch.uint8)
        packed[begin // 2 : (end + 1) // 2, 0] = codes[0::2] << 4 | codes[1::2]
    if n % block_size:
        absmax[-1].clamp_(min=MIN_ABSMAX)  # as bitsandbytes stores it for a partial block, and only there
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("w: expected finite values, got inf or NaN")
    return packed, absmax


def absmax_of(q: NF4Tensor) -> Tensor:
    """absmax in float32, of a double-quantized tensor too: code · nested_absmax, rounded, plus the offset."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax
    return dequantize_blockwise8(q.absmax, q.nested_absmax, NESTED_BLOCK_SIZE, True) + q.nested_offset


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """NF4_CODE[code] · absmax in float32, rounded to `dtype`, of q.shape."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_nf4_out(q, out)
    return out


def dequantize_nf4_out(q: NF4Tensor, out: Tensor) -> None:
    """The same, written into `out`: it or its transpose is contiguous."""
    n, in_order = q.numel(), out.is_contiguous()
    flat, packed = (out if in_order else out.t()).view(-1), q.packed.view(-1)
    code, absmax = nf4_code(q.device), absmax_of(q)
    for begin in range(0, n, CHUNK):
        end = min(begin + CHUNK, n)
        pairs = packed[begin // 2 : (end + 1) // 2]
        nibbles = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[: end - begin]
        e = torch.arange(begin, end, device=q.device)
        values = code[nibbles.int()] * absmax[e // q.block_size]
        if in_order:
            flat[begin:end] = values
        else:
            rows, columns = q.shape
            flat[e % columns * rows + e // columns] = values.to(out.dtype)


IMPLS: dict[str, Callable] = {
    "quantize_nf4": quantize_nf4,
    "dequantize_nf4": dequantize_nf4,
    "dequantize_nf4_out": dequantize_nf4_out,
}
