"""The NF4 codec: every block size and dtype; n is passed in 64 bits where 32 do not hold it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from lora_ops.quant.nf4 import BLOCK_SIZES
from lora_ops.quant.nf4.codec import triton_impl
from lora_ops.runtime import triton_launch
from lora_ops.runtime.checks import dtype_name
from tests.gpu_proof.expect import Expect, GateCase, meta, meta_nf4


def cases() -> Iterator[GateCase]:
    call: Callable[[], object]
    for n, huge in ((1 << 20, False), (3 * 2**31 + 77, True)):
        for dtype in triton_launch.DTYPES if not huge else (torch.bfloat16,):
            suffix = f"{dtype_name(dtype)}{' n > 2^31' if huge else ''}"
            for b in BLOCK_SIZES if not huge else (64,):
                call = functools.partial(triton_impl.quantize_nf4, meta(n, dtype=dtype), b)
                yield GateCase(f"quantize b{b} {suffix}", call, Expect(wide="load", exact=True), huge)
            for b in (32, 64):  # larger blocks run the kernel of 64
                for nested in (False, True):
                    q = meta_nf4(n, block_size=b, nested=nested)
                    call = functools.partial(triton_impl.dequantize_nf4, q, dtype)
                    name = f"dequantize b{b}{' nested' if nested else ''} {suffix}"
                    yield GateCase(name, call, Expect(wide="store", exact=True), huge)
