"""AdamW's update: one kernel for each combination of dtypes, bits and rounding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ops.kernels.adamw import triton_impl
from lora_ops.kernels.adamw.operands import Slices
from lora_ops.kernels.adamw.reference import BLOCK_SIZE
from tests.gpu_proof.expect import Expect, GateCase, meta

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N = 1 << 20


def cases() -> Iterator[GateCase]:
    dtypes = [(p, g) for p in DTYPES for g in dict.fromkeys((p, torch.float32))]
    for (p, g), bits in itertools.product(dtypes, (32, 8)):
        for seed in (None, 5) if p == torch.bfloat16 else (None,):
            states = [meta(N, dtype=torch.uint8 if bits == 8 else torch.float32) for _ in range(2)]
            absmaxes = [meta(N // BLOCK_SIZE) for _ in range(2)] if bits == 8 else []
            names = (str(t).removeprefix("torch.") for t in (p, g))
            name = f"{bits}-bit {' '.join(names)}{' stochastic' if seed else ''}"
            call = functools.partial(_call, meta(N, dtype=p), meta(N, dtype=g), states, absmaxes, seed)
            yield GateCase(name, call, Expect(wide="load store", exact=True))


def _call(p: Tensor, g: Tensor, states: list[Tensor], absmaxes: list[Tensor], seed: int | None) -> None:
    m, v = states
    constants, index = meta(1, 8), torch.tensor([[0, 0, 1, 0]])
    triton_impl.adamw_(slices=Slices([p], [g], [m], [v], absmaxes, constants, index, seed))
