"""What a gate case is: calls of launchers, and what the machine code of their kernels must show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4Tensor

MMA: Mapping[str, str] = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
HMMA: Mapping[str, str] = {**MMA, "sm_90": "HMMA", "sm_100": "HMMA"}  # tiles of fewer rows than wgmma's 64
# The chips on which Triton multiplies 16 bits by matrix instructions, and the others: there products run on the plain
# FMA units in small tiles, bfloat16 and the K-step route are not served.
MATRIX, FMA = frozenset(MMA), frozenset({"sm_75"})
ALL = MATRIX | FMA
# `Expect.wide` where a matrix has an odd number of columns: its rows begin at any element, not every 16 bytes.
ODD_ROWS = ""


@dataclass(frozen=True)
class Expect:
    """What a kernel's machine code must show, beyond no spills and no atomics, which hold for all.

    Attributes:
        mma: the matrix instruction by chip, such as MMA; empty: none is asked for.
        wide: "load", "store", "load store": streams on that side with 16-byte accesses.
        exact: bit-exact arithmetic: no contraction to fused multiply-add, no flush of denormals.
    """

    mma: Mapping[str, str] = field(default_factory=dict)
    wide: str = ""
    exact: bool = False


@dataclass(frozen=True)
class GateCase:
    """Calls of launchers whose kernels the gate compiles for every chip.

    Attributes:
        name: the config, as the table names it.
        call: runs the launchers on tensors of the meta device (for which `launch` records and returns).
        expect: what the code must show; by kernel name where the call launches several kernels.
        huge: some tensor has more than 2^31 elements: the interpreter also checks every address that the first, middle
            and last programs touch.
        chips: those on which the op launches this.
    """

    name: str
    call: Callable[[], Any]
    expect: Expect | Mapping[str, Expect] = Expect()
    huge: bool = False
    chips: frozenset[str] = ALL

    def expects(self, kernel: str) -> Expect:
        return self.expect if isinstance(self.expect, Expect) else self.expect.get(kernel, Expect())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape and no values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_nf4(*shape: int, block_size: int = 64, nested: bool, dtype: torch.dtype = torch.bfloat16) -> NF4Tensor:
    """A quantized tensor that has a shape and no values."""
    n = torch.Size(shape).numel()
    n_blocks = -(-n // block_size)
    packed = meta((n + 1) // 2, 1, dtype=torch.uint8)
    if not nested:
        return NF4Tensor(packed, meta(n_blocks), shape, dtype, block_size)
    absmax, groups = meta(n_blocks, dtype=torch.uint8), meta(-(-n_blocks // NESTED_BLOCK_SIZE))
    return NF4Tensor(packed, absmax, shape, dtype, block_size, groups, meta())


def served(dtype: torch.dtype) -> Iterator[tuple[torch.dtype, frozenset[str], str]]:
    """(dtype, chips, end of the name) for a case of products: what has none in bfloat16 gets it in float16."""
    yield dtype, ALL if dtype == torch.float32 else MATRIX, ""
    if dtype == torch.bfloat16:
        yield torch.float16, FMA, " on FMA units"
