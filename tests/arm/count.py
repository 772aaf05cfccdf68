"""Instructions of ARM's kernels by instruction set, counted under qemu: `python -m tests.arm.count` after `make arm`.

A count is no time, but it does not depend on the machine, and says what a kernel with a higher one has to make up for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE

import torch
from torch import Tensor

from lora_ops.kernels.adamw import native_abi as adamw_abi
from lora_ops.kernels.lora_linear import native_abi as lora_abi
from lora_ops.paging import native_abi as pages_abi
from lora_ops.quant import native_abi as weight_abi
from lora_ops.quant.blockwise8 import native_impl as blockwise8
from lora_ops.quant.blockwise8.reference import dynamic_map
from lora_ops.quant.nf4 import native_abi as nf4_abi
from lora_ops.runtime import native
from tests.arm import build, remote

PLUGIN = build.OUT / "count.so"
ISAS = ("portable", "neon", "neon_bf16")
SIDE, RANK, N = 256, 16, 1 << 16  # of the weight, of the adapter, elements
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Case = tuple[str, int, Callable[[], None]]  # name, what the count is divided by, the call


def codec() -> Iterator[Case]:
    packed, absmax = torch.zeros(N // 2, dtype=torch.uint8), torch.zeros(N // 64)
    weight = nf4_abi.NF4Weight(packed.data_ptr(), absmax.data_ptr(), block_size=64)
    for dtype, name in NAMES.items():
        w = torch.randn(N).to(dtype)
        yield f"NF4 quantize, {name}, an element", N, partial(nf4_abi.quantize, w, 64, packed, absmax)
        yield f"NF4 dequantize, {name}, an element", N, partial(nf4_abi.dequantize, weight, 0, N, w)
    x, codes, map_ = torch.randn(N), torch.zeros(N, dtype=torch.uint8), dynamic_map(True)
    absmax8 = torch.zeros(N // 256)
    yield "8-bit quantize, an element", N, partial(blockwise8.quantize, x, 256, map_, codes, absmax8)
    yield "8-bit dequantize, an element", N, partial(blockwise8.dequantize, codes, absmax8, 256, map_, x)


def products() -> Iterator[Case]:
    packed, absmax = torch.zeros(SIDE * SIDE // 2, dtype=torch.uint8), torch.ones(SIDE * SIDE // 64)
    weight = weight_abi.WeightView(nf4=nf4_abi.NF4Weight(packed.data_ptr(), absmax.data_ptr(), block_size=64))
    a, b = torch.randn(RANK, SIDE), torch.randn(SIDE, RANK)
    adapter = lora_abi.adapter_view(a, b, 1.0, 3277, 1)
    for dtype, name in NAMES.items():
        for m in (1, 64):
            x, y = torch.randn(m, SIDE).to(dtype), torch.zeros(m, SIDE, dtype=dtype)
            work = m * SIDE * SIDE
            yield f"NF4 product, {name}, M = {m}, a multiply-add", work, partial(weight_abi.linear, weight, x, None, y)
            yield f"its dX, {name}, M = {m}, a multiply-add", work, partial(weight_abi.linear_dx, weight, x, y)
        s, da, db = torch.zeros(m, RANK), torch.zeros_like(a), torch.zeros_like(b)
        work = 2 * m * SIDE * RANK
        yield f"low-rank forward, {name}, M = {m}, a multiply-add", work, partial(lora_abi.forward, adapter, x, s, y)
        backward = partial(lora_abi.backward, adapter, x, x, s, dx=y, dlora_a=da, dlora_b=db)
        yield f"low-rank backward, {name}, M = {m}, a multiply-add", 2 * work, backward


def others() -> Iterator[Case]:
    bits, bytes_ = torch.zeros(SIDE, SIDE // 8, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8)
    mask = partial(lora_abi.dropout_mask, slice(0, SIDE), SIDE, 3277, 1, 0, bits)
    yield "dropout mask, an element", SIDE * SIDE, mask
    yield "checksum, a byte", N, partial(pages_abi.checksum, bytes_.data_ptr(), N)
    constants = torch.tensor([[1 - 1e-4, 0.1, 0.999, 1 - 0.999, 1e-8, 1e-2, 1.7, 1.0]])
    for state_bits, dtype in ((32, torch.float32), (32, torch.bfloat16), (32, torch.float16), (8, torch.float32)):
        p, grad = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
        states = [torch.zeros(N, dtype=torch.float32 if state_bits == 32 else torch.uint8) for _ in range(2)]
        absmax = [torch.ones(N // 256) for _ in range(2)]

        def step(tensors: list[Tensor], absmax: list[Tensor], number: int) -> None:
            record = *(t.data_ptr() for t in tensors), *(t.data_ptr() for t in absmax), N, number, number, 0, 0, 1, 0
            record = record if absmax else (*record[:4], 0, 0, *record[4:])
            adamw_abi.adamw([record], constants, dynamic_map(True), dynamic_map(False), None)

        tensors = [p, grad, *states]
        call = partial(step, tensors, absmax if state_bits == 8 else [], native.DTYPE_NUMBERS[dtype])
        yield f"AdamW, {state_bits}-bit states, {NAMES[dtype]}, an element", N, call


def instructions(memory: remote.Memory, isa: str, call: Callable[[], None]) -> float:
    """Of one call: what two more take, halved."""
    counts = []
    for times in (1, 3):
        library = remote.connect(memory, times=times, options=["-plugin", str(PLUGIN)], stderr=PIPE)
        with remote.using(library, isa):
            call()
        counts.append(int(library.close().split()[-1]))
    return (counts[1] - counts[0]) / 2


def main() -> int:
    if reason := build.missing() or build.stale():
        print(f"count: {reason}", file=sys.stderr)
        return 1
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-std=c11", "-O1", "-shared", "-fPIC", str(source), "-o", str(PLUGIN)], check=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| instructions of | " + " | ".join(ISAS) + " | ratio |\n| --- |" + " --- |" * (len(ISAS) + 1))
    memory = remote.Memory()
    with remote.noting(memory):
        for name, work, call in (case for cases in (codec, products, others) for case in cases()):
            counts = [instructions(memory, isa, call) / work for isa in ISAS]
            print(
                f"| {name} | " + " | ".join(f"{c:.2f}" for c in counts) + f" | {counts[-1] / counts[0]:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
