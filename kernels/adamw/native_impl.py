"""AdamW's update in C++ on the CPU, all slices in one call: csrc/cpu/adamw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ops.kernels.adamw import native_abi
from lora_ops.kernels.adamw.operands import Slices
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.runtime import native


def adamw_(*, slices: Slices) -> None:
    """Update every slice in place; see op.py for the arguments."""
    params, grads, exp_avgs, exp_avg_sqs, absmaxes, constants, index, seed = slices
    scales = iter(absmaxes)
    rows = []
    for p, g, m, v, place in zip(params, grads, exp_avgs, exp_avg_sqs, index.tolist(), strict=True):
        coded = m.dtype == torch.uint8
        absmax = (next(scales).data_ptr(), next(scales).data_ptr()) if coded else (0, 0)
        dtypes = native.DTYPE_NUMBERS[p.dtype], native.DTYPE_NUMBERS[g.dtype]
        rows.append((p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), *absmax, p.numel(), *dtypes, *place))
    native_abi.adamw(rows, constants, dynamic_map(True), dynamic_map(False), seed)


def declines(op: str, lead: Tensor, **operands: Any) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return native.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"adamw_": adamw_}
