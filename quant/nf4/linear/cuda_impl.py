"""Linear layer over an NF4 weight in CUDA C++, for few tokens: csrc/cuda/nf4_linear.cu."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import NF4Tensor
from lora_ops.quant.nf4.linear.reference import as_matrix
from lora_ops.runtime import cuda
from lora_ops.runtime.checks import dtype_name
from lora_ops.runtime.dispatch import as_output

DTYPES = (torch.bfloat16, torch.float16)
MAX_TOKENS = 64  # as many as accumulators fit the registers for; more read W again
MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    return dynamic_map(signed=True).to(device)


def weight_of(q: NF4Tensor) -> cuda.NF4Weight:
    """The C view of q, which must outlive it."""
    if q.nested_absmax is None or q.nested_offset is None:
        return cuda.NF4Weight(q.packed.data_ptr(), q.absmax.data_ptr(), None, None, None, None, q.block_size)
    scales = q.absmax, _dynamic_map(q.device), q.nested_absmax, q.nested_offset
    return cuda.NF4Weight(q.packed.data_ptr(), None, *(t.data_ptr() for t in scales), q.block_size)


def nf4_linear(*, x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], q (N, K), bias [N] -> [..., N]."""
    x2 = as_matrix(x)
    if x2.stride(1) != 1 or (x2.stride(0) % 8 and x2.shape[1] % 8 == 0):
        x2 = x2.contiguous()  # a few rows, which the kernel then loads 16 bytes at a time
    y = torch.empty(x2.shape[0], q.shape[0], dtype=x.dtype, device=x.device)
    weight = weight_of(q)
    bias = None if bias is None else bias.contiguous()
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            cuda.nf4_linear(weight, x2, bias, y)
    else:
        cuda.nf4_linear(weight, x2, bias, y)
    return as_output(y, (*x.shape[:-1], q.shape[0]))


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if lead.device.type != "cuda" or torch.version.hip is not None:
        return (
            f"CUDA kernels run on NVIDIA GPUs, not on {lead.device.type if torch.version.hip is None else 'AMD ones'}"
        )
    if torch.cuda.get_device_capability(lead.device) < MIN_CAPABILITY:
        return "CUDA kernels need compute capability 8.0"
    if lead.dtype not in DTYPES:
        return f"CUDA kernels have no {dtype_name(lead.dtype)}"
    tokens = lead.numel() // max(1, lead.shape[-1])
    if tokens > MAX_TOKENS:
        return f"nf4_linear's CUDA kernel takes up to {MAX_TOKENS} tokens, not {tokens}"
    return None


IMPLS: dict[str, Callable] = {"nf4_linear": nf4_linear}
