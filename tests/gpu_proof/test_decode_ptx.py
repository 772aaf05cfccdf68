"""The decoder's PTX, executed here instruction by instruction, against the code book: all 256 bytes in each place."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from lora_ops.quant.nf4 import nf4_code, triton_decode


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is byte (nibble i of the selector) of b:a; PTX ISA, section prmt, default mode."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(both)
    for i in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        assert not (nibble & np.uint64(8)).any(), "bit 3 of a selector replicates the sign: never meant here"
        out |= (both >> nibble * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out.astype(np.uint32)


def execute(ptx: str, word: np.ndarray, n_out: int) -> list[np.ndarray]:
    """Run the assembly on an array of words; the values of its outputs."""
    ops: dict[str, Callable] = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shr.b32": lambda a, b: a >> b,
        "prmt.b32": prmt,
    }
    registers = {f"${n_out}": word}
    for line in re.sub(r"[{}]", "", ptx).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, operands = line.split(maxsplit=1)
        to, *sources = (s.strip() for s in operands.split(","))
        values = [registers[s] if s in registers else np.full_like(word, int(s, 0)) for s in sources]
        if op == "lop3.b32":
            a, b, c, table = values
            assert (table == 0xEA).all()
            registers[to] = a & b | c
        else:
            registers[to] = ops[op](*values)
    return [registers[f"${i}"] for i in range(n_out)]


def test_every_byte_in_every_place() -> None:
    ptx, constraints = triton_decode.decode_ptx()
    n_out = constraints.count("=")
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (4 * 256, 4), dtype=np.uint8)
    for place in range(4):
        packed[256 * place : 256 * (place + 1), place] = np.arange(256)
    out = execute(ptx, packed.view(np.uint32)[:, 0], n_out)
    values = torch.from_numpy(np.stack(out, axis=1).view(np.float32)).view(-1, 2, 4)  # [word, even or odd, byte]
    code = nf4_code()
    codes = torch.from_numpy(packed).int()
    assert torch.equal(values[:, 0], code[codes >> 4])
    assert torch.equal(values[:, 1], code[codes & 15])


def test_the_kernels_run_this_text() -> None:
    assert triton_decode._PTX.value == triton_decode.decode_ptx()[0]


def test_instruction_budget() -> None:
    """Instructions a weight: about 15 fit a decode pass, with the scaling."""
    ptx, _ = triton_decode.decode_ptx()
    assert len(re.findall(r"\b(?:prmt|and|shr|lop3)\.b32", ptx)) / 8 <= 5.75
