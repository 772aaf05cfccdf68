"""What this CPU is slow at, which decides how a model should be loaded; told by its features, never by its name."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Collection

import torch
from torch import nn

from lora_ops.runtime.checks import dtype_name

logger = logging.getLogger("lora_ops")

SLOW_16BIT_REMEDY = (
    "load the model with dtype=torch.float32; not concerned are LoRA layers, NF4 weights and, after inject, frozen "
    "linear layers and attention"
)
DTYPES_16BIT = (torch.bfloat16, torch.float16)
_NAMES_TOLD = 3
_told: set[torch.dtype] = set()


@functools.cache
def slow_16bit_reason(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why torch's products of matrices in `dtype` are slow on this CPU, as in 16 bits; None if they are not.

    Where oneDNN does not take the dtype, torch multiplies in loops of its own: on AVX2 they take 5 times as long as in
    float32 for x Wᵀ and 120 times as long for dY W, the backward of a frozen layer.
    """
    if dtype not in DTYPES_16BIT or _onednn_takes(dtype):
        return None
    needed = "instructions for it"
    if platform.machine().lower() in ("x86_64", "amd64"):
        needed = "AVX-512 or AMX" if dtype == torch.bfloat16 else "AVX512-FP16 or AMX-FP16"
    return (
        f"torch's products in {dtype_name(dtype)} take 5 to 120 times as long as in float32 on this CPU "
        f"({torch.backends.cpu.get_cpu_capability()}, without {needed})"
    )


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this 16-bit dtype here, as torch asks before it calls it."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def warn_slow_16bit(model: nn.Module, own: Collection[nn.Module] = ()) -> None:
    """Say once for each 16-bit dtype that frozen dense weights of the model are in it where its products are slow.

    Those of the layers `own` are multiplied by lora_ops and not by torch.
    """
    for dtype in DTYPES_16BIT:
        if dtype in _told or slow_16bit_reason(dtype) is None:
            continue
        frozen = _frozen_matrices(model, dtype, own)
        if frozen:
            _told.add(dtype)
            some = ", ".join(list(frozen)[:_NAMES_TOLD]) + (", ..." if len(frozen) > _NAMES_TOLD else "")
            logger.warning(
                "%d frozen weights are dense %s (%.0f MiB: %s): %s; %s",
                len(frozen),
                dtype_name(dtype),
                sum(frozen.values()) / 2**20,
                some,
                slow_16bit_reason(dtype),
                SLOW_16BIT_REMEDY,
            )


def _frozen_matrices(model: nn.Module, dtype: torch.dtype, own: Collection[nn.Module]) -> dict[str, int]:
    """Bytes, by name, of the frozen weights on the CPU that torch multiplies with; not those of embeddings."""
    return {
        f"{name}.{key}".lstrip("."): p.nbytes
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and module not in own
        for key, p in module.named_parameters(recurse=False)
        if p.dtype == dtype and p.is_cpu and p.dim() > 1 and not p.requires_grad
    }
