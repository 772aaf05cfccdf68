"""8-bit blockwise codes: every block size; n is passed in 64 bits where 32 do not hold it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from lora_ops.quant.blockwise8 import triton_impl
from tests.gpu_proof.expect import Expect, GateCase, meta


def cases() -> Iterator[GateCase]:
    call: Callable[[], object]
    for n, huge in ((1 << 20, False), (3 * 2**31 + 77, True)):
        suffix = " n > 2^31" if huge else ""
        x, codes = meta(n), meta(n, dtype=torch.uint8)
        for b in (256,) if huge else triton_impl.BLOCK_SIZES:
            call = functools.partial(triton_impl.quantize_blockwise8, x, b, True)
            yield GateCase(f"quantize b{b}{suffix}", call, Expect(wide="load", exact=True), huge)
        call = functools.partial(triton_impl.dequantize_blockwise8, codes, x[: -(-n // 256)], 256, True)
        yield GateCase(f"dequantize{suffix}", call, Expect(wide="store", exact=True), huge)
