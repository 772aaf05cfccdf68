"""NF4 codes to values inside Triton kernels: device functions for every kernel that reads packed weights.

A 16-entry table does not fit one byte permute, which picks 4 bytes out of 8, so each byte of the values is looked up in
both halves of the table and a third permute takes the half that bit 3 of the code names. A packed word is its own
selector, so nibbles are never unpacked. Instructions a weight: 2.6 to 16 bits, 5.6 to fp32, and in SASS up to 2 more
that load the table (ptxas does not keep it in registers). A tree of selects takes 20; a decode pass has room for 15.

The assembly is written from NF4_CODE here; tests/gpu_proof executes its text and holds every byte to the code book.
The interpreter runs no assembly and AMD has no `prmt`: both take the tree of selects.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lora_ops.quant.nf4 import NF4_CODE
from lora_ops.runtime.triton_launch import interpreting

PACK = 4  # bytes, 8 codes, to a call of the assembly


def _table_bytes(dtype: torch.dtype) -> list[bytes]:
    """The 16 code values rounded to `dtype`, as little-endian bytes."""
    values = torch.tensor(NF4_CODE, dtype=torch.float32).to(dtype)
    if dtype == torch.float32:
        return [struct.pack("<f", v) for v in values.tolist()]
    return [struct.pack("<h", v) for v in values.view(torch.int16).tolist()]


def _looked_up_planes(table: Sequence[bytes], half: int) -> list[str]:
    """PTX that leaves byte p of the four codes of selector `s{half}` in register `p{p}`."""
    lines = []
    for p in range(len(table[0])):
        plane = bytes(entry[p] for entry in table)
        low0, low1, high0, high1 = (f"0x{v:08x}" for v in struct.unpack("<4I", plane))
        lines += [
            f"prmt.b32 l, {low0}, {low1}, s{half};",
            f"prmt.b32 h, {high0}, {high1}, s{half};",
            f"prmt.b32 p{p}, l, h, m{half};",
        ]
    return lines


def decode_ptx(dtype: torch.dtype) -> tuple[str, str]:
    """Assembly and constraints that decode a word of 4 bytes to the values of its 4 even and then its 4 odd codes."""
    table = _table_bytes(dtype)
    size = len(table[0])
    n_out = 2 * PACK * size // 4
    word = f"${n_out}"
    # Nibbles of a half word, and so the bytes looked up with it, stand in the order odd 0, even 0, odd 1, even 1.
    lines = [
        "{ .reg .b32 w, s0, s1, m0, m1, l, h, " + ", ".join(f"p{p}, q{p}" for p in range(size)) + ";",
        f"mov.b32 w, {word};",
        "and.b32 s0, w, 0x77777777;",  # bits 0-2 of each code; prmt reads the low 16 bits
        "shr.b32 s1, s0, 16;",
        "shr.b32 m0, w, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xea;",  # (a & b) | c: byte i of l, or of h where bit 3 is set
        "shr.b32 m1, m0, 16;",
    ]
    for half in range(2):
        lines += _looked_up_planes(table, half)
        if size == 2:  # two codes of 16 bits to a register
            lines += [f"prmt.b32 ${half}, p0, p1, 0x7351;", f"prmt.b32 ${2 + half}, p0, p1, 0x6240;"]
            continue
        lines += [
            "prmt.b32 q0, p0, p1, 0x5140;",
            "prmt.b32 q1, p0, p1, 0x7362;",
            "prmt.b32 q2, p2, p3, 0x5140;",
            "prmt.b32 q3, p2, p3, 0x7362;",
        ]
        for i in range(2):
            lines += [
                f"prmt.b32 ${PACK + 2 * half + i}, q{i}, q{i + 2}, 0x5410;",  # odd
                f"prmt.b32 ${2 * half + i}, q{i}, q{i + 2}, 0x7632;",  # even
            ]
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * n_out + ["r"])


_CODE = tl.constexpr(NF4_CODE)
_INTERPRETING = tl.constexpr(interpreting())
_PTX_FP32, _CONSTRAINTS_FP32 = map(tl.constexpr, decode_ptx(torch.float32))
_PTX_BF16, _CONSTRAINTS_16 = map(tl.constexpr, decode_ptx(torch.bfloat16))
_PTX_FP16 = tl.constexpr(decode_ptx(torch.float16)[0])


@triton.jit
def _select_code(code):
    """NF4_CODE[code] by a tree of selects, int in [0, 16) -> fp32."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    v0 = tl.where(b1, tl.where(b0, _CODE[3], _CODE[2]), tl.where(b0, _CODE[1], _CODE[0]))
    v1 = tl.where(b1, tl.where(b0, _CODE[7], _CODE[6]), tl.where(b0, _CODE[5], _CODE[4]))
    v2 = tl.where(b1, tl.where(b0, _CODE[11], _CODE[10]), tl.where(b0, _CODE[9], _CODE[8]))
    v3 = tl.where(b1, tl.where(b0, _CODE[15], _CODE[14]), tl.where(b0, _CODE[13], _CODE[12]))
    return tl.where((code & 8) != 0, tl.where(b2, v3, v2), tl.where(b2, v1, v0))


@triton.jit
def decode_nf4(packed):
    """Values of packed codes: uint8 of any shape -> (even, odd), fp32 of that shape, exact.

    To have them in the order of the weight's elements: tl.reshape(tl.join(even, odd), [..., 2 * last]).
    """
    if _INTERPRETING or tl.target_info.is_hip():
        even = _select_code((packed >> 4).to(tl.int32))
        odd = _select_code((packed & 15).to(tl.int32))
    else:
        even, odd = tl.inline_asm_elementwise(
            _PTX_FP32, _CONSTRAINTS_FP32, [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
        even = even.to(tl.float32, bitcast=True)
        odd = odd.to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def decode_nf4_rounded(packed, DTYPE: tl.constexpr):
    """The same with each code value rounded to DTYPE (tl.bfloat16, tl.float16), for products that are scaled later."""
    if _INTERPRETING or tl.target_info.is_hip():
        even = _select_code((packed >> 4).to(tl.int32)).to(DTYPE)
        odd = _select_code((packed & 15).to(tl.int32)).to(DTYPE)
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        even, odd = tl.inline_asm_elementwise(
            _PTX_BF16, _CONSTRAINTS_16, [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            _PTX_FP16, _CONSTRAINTS_16, [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return even, odd


@triton.jit
def load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, map_ptr, block, mask, NESTED: tl.constexpr):
    """absmax of quantization blocks, fp32, 0 where masked; map_ptr: dynamic_map(signed=True).

    Doubly quantized: map[code] · nested_absmax, rounded, plus the offset: a kernel that must be bit-exact is launched
    with enable_fp_fusion=False. Without double quantization only absmax_ptr is read.
    """
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        value = tl.load(map_ptr + code, mask=mask, other=0.0) * nested
        return tl.where(mask, value + tl.load(offset_ptr), 0.0)
    return tl.load(absmax_ptr + block, mask=mask, other=0.0)
