"""8-bit blockwise codes in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lora_ops.runtime.dispatch import as_output

MIN_ABSMAX = 1e-38  # keeps the reciprocal of an all-zero block finite


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic map, float32, ascending, on the CPU.

    Decade i of seven (10^(i - 6)) holds the midpoints of 2^i (signed) or 2^(i + 1) (unsigned) equal steps from 0.1
    to 1; 0 and 1 complete it. Arithmetic in the order of bitsandbytes, whose files hold this map.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        magnitudes = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += magnitudes.tolist()
        if signed:
            values += (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def dynamic_thresholds(signed: bool) -> Tensor:
    """The 255 decision thresholds: v takes a code above t exactly if v > t, for float32 v.

    A midpoint of two float32 codes is exact in float64; rounded down to float32 it still decides every value rightly.
    """
    code = dynamic_map(signed).double()
    midpoints = (code[:-1] + code[1:]) / 2
    rounded = midpoints.float()
    below = torch.nextafter(rounded, torch.tensor(-torch.inf))
    return torch.where(rounded.double() > midpoints, below, rounded)


def scaled(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x / absmax of its block, in [-1, 1], and absmax; full blocks multiply by the reciprocal, a partial one divides.

    Args:
        x: float32 [n].

    Returns:
        float32 [n], and absmax float32 [ceil(n / block_size)].
    """
    n_full = x.numel() - x.numel() % block_size
    full = x[:n_full].view(-1, block_size)
    absmax = full.abs().amax(dim=1)
    v = (full * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]).view(-1)
    if n_full < x.numel():
        tail_absmax = x[n_full:].abs().amax()
        absmax = torch.cat([absmax, tail_absmax[None]])
        v = torch.cat([v, x[n_full:] / tail_absmax.clamp(min=MIN_ABSMAX)])
    return v.clamp(-1, 1), absmax


def quantize_blockwise8(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """codes uint8 of x.shape and absmax fp32 [ceil(n / block_size)]."""
    v, absmax = scaled(x.reshape(-1), block_size)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("x: expected finite values, got inf or NaN")
    codes = torch.bucketize(v, dynamic_thresholds(signed).to(x.device), out_int32=True)
    return as_output(codes.to(torch.uint8), x.shape), absmax


def dequantize_blockwise8(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """map[code] · absmax of its block, float32 of codes.shape."""
    block = torch.arange(codes.numel(), device=codes.device) // block_size
    values = dynamic_map(signed).to(codes.device)[codes.reshape(-1).int()]
    return as_output(values * absmax[block], codes.shape)


IMPLS: dict[str, Callable] = {
    "quantize_blockwise8": quantize_blockwise8,
    "dequantize_blockwise8": dequantize_blockwise8,
}
