"""NF4 codes to values inside Triton kernels: device functions for every kernel that reads packed weights.

A 16-entry table does not fit one byte permute, which picks 4 bytes out of 8, so each byte of the values is looked up in
both halves of the table and a third permute takes the half that bit 3 of the code names. A packed word is its own
selector, so nibbles are never unpacked. Instructions a weight: 5.6, and in SASS up to 2 more that load the table (ptxas
does not keep it in registers). A tree of selects takes 20; a decode pass has room for 15.

The assembly is written from NF4_CODE here; tests/gpu_proof executes its text and holds every byte to the code book.
The interpreter runs no assembly and AMD has no `prmt`: both take the tree of selects.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from lora_ops.quant.nf4 import NF4_CODE
from lora_ops.runtime.triton_launch import interpreting

PACK = 4  # bytes, 8 codes, to a call of the assembly


def _looked_up_planes(half: int) -> list[str]:
    """PTX that leaves byte p of the four codes of selector `s{half}` in register `p{p}`."""
    lines = []
    for p in range(4):
        plane = bytes(struct.pack("<f", value)[p] for value in NF4_CODE)
        low0, low1, high0, high1 = (f"0x{v:08x}" for v in struct.unpack("<4I", plane))
        lines += [
            f"prmt.b32 l, {low0}, {low1}, s{half};",
            f"prmt.b32 h, {high0}, {high1}, s{half};",
            f"prmt.b32 p{p}, l, h, m{half};",
        ]
    return lines


def decode_ptx() -> tuple[str, str]:
    """Assembly and constraints that decode a word of 4 bytes to the values of its 4 even and then its 4 odd codes."""
    n_out = 2 * PACK
    # Nibbles of a half word, and so the bytes looked up with it, stand in the order odd 0, even 0, odd 1, even 1.
    lines = [
        "{ .reg .b32 w, s0, s1, m0, m1, l, h, " + ", ".join(f"p{p}, q{p}" for p in range(4)) + ";",
        f"mov.b32 w, ${n_out};",
        "and.b32 s0, w, 0x77777777;",  # bits 0-2 of each code; prmt reads the low 16 bits
        "shr.b32 s1, s0, 16;",
        "shr.b32 m0, w, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xea;",  # (a & b) | c: byte i of l, or of h where bit 3 is set
        "shr.b32 m1, m0, 16;",
    ]
    for half in range(2):
        lines += [
            *_looked_up_planes(half),
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
_PTX, _CONSTRAINTS = map(tl.constexpr, decode_ptx())


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
            _PTX, _CONSTRAINTS, [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
        even = even.to(tl.float32, bitcast=True)
        odd = odd.to(tl.float32, bitcast=True)
    return even, odd
