"""Products with an NF4 weight that decode it on the way, for few tokens.

    nf4_gemv    y = x Wᵀ + b                       # M <= 4: bandwidth-bound, no matrix instruction
    nf4_gemm    y = x Wᵀ + b, dX = dY W            # decodes each tile in the loop; sums split in a fixed order

A GEMV of [14336, 4096] reads 33 MB (4.5 bits a weight), 6.9 µs at 4.8 TB/s, and has 3 lane instructions a weight to
spend; decoding to fp32 takes 5.6 alone, so it is instruction-bound. The GEMM does 2 M FLOPs a weight,
and for M <= 64 decoding bounds it too: W is read and decoded once for every block_m tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.quant.blockwise8.triton_impl import map_on
from lora_ops.quant.nf4 import NESTED_BLOCK_SIZE, NF4_CODE, NF4Tensor
from lora_ops.quant.nf4.triton_decode import decode_nf4
from lora_ops.runtime.triton_launch import launch, on_fma_units

# Programs that a split sum aims at: two an SM of an H100/H200; the same on every chip, so that results are too.
TARGET_PROGRAMS = 256
MAX_GEMV_M = 4
ADD_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """Tile [block_m, block_j] of the output, block_i elements of the sum a step."""

    block_m: int
    block_j: int
    block_i: int
    num_warps: int
    num_stages: int

    @property
    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_J": self.block_j,
            "BLOCK_I": self.block_i,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By padded tokens. A tile of 64 × 64 weights takes 32 fp32 registers a thread of 4 warps while it is decoded.
GEMM_16BIT = {
    16: Tile(16, 64, 64, 4, 4),
    32: Tile(32, 64, 64, 4, 4),
    64: Tile(64, 64, 64, 8, 3),
    128: Tile(128, 64, 32, 8, 4),  # with steps of 64 Triton 3.6 spills on sm_80, sm_89 and sm_120
}
# Where elements of x load, or those of the result are stored, one by one, which takes an address each: with the tiles
# above Triton 3.8 spills a few bytes on sm_120 and gfx942.
GEMM_ODD = GEMM_16BIT | {16: Tile(16, 64, 64, 8, 4), 32: Tile(32, 64, 64, 4, 2)}
# Plain FMA units (triton_launch.on_fma_units).
GEMM_FMA = {m: Tile(min(m, 32), 32, 32, 4, 2) for m in GEMM_16BIT}
# Where rows share blocks, or bytes: each weight has its own 64-bit address, which takes registers.
RAGGED_16BIT = {m: replace(GEMM_16BIT[min(m, 64)], block_j=32, block_i=32) for m in GEMM_16BIT}
RAGGED_FMA = {m: replace(tile, num_warps=8) for m, tile in GEMM_FMA.items()}
GEMV_ROWS = 8
GEMV_COLUMNS = 512  # 8 rows × 256 bytes: 16 bytes a thread of 4 warps of 32


_GROUP = tl.constexpr(NESTED_BLOCK_SIZE)
_CODE_BITS = tl.constexpr(struct.unpack("<16i", struct.pack("<16f", *NF4_CODE)))


@triton.jit
def _blend(mask, ones, zeros):
    """Bits of `ones` where mask is 1, of `zeros` elsewhere: one v_bfi_b32."""
    return zeros ^ ((ones ^ zeros) & mask)


@triton.jit
def _blend_code(code):
    """NF4_CODE[code], int32 in [0, 16) -> fp32, by 15 blends under 4 masks that live in vector registers."""
    m0 = -(code & 1)
    m1 = -((code >> 1) & 1)
    m2 = -((code >> 2) & 1)
    v0 = _blend(m1, _blend(m0, _CODE_BITS[3], _CODE_BITS[2]), _blend(m0, _CODE_BITS[1], _CODE_BITS[0]))
    v1 = _blend(m1, _blend(m0, _CODE_BITS[7], _CODE_BITS[6]), _blend(m0, _CODE_BITS[5], _CODE_BITS[4]))
    v2 = _blend(m1, _blend(m0, _CODE_BITS[11], _CODE_BITS[10]), _blend(m0, _CODE_BITS[9], _CODE_BITS[8]))
    v3 = _blend(m1, _blend(m0, _CODE_BITS[15], _CODE_BITS[14]), _blend(m0, _CODE_BITS[13], _CODE_BITS[12]))
    bits = _blend(-(code >> 3), _blend(m2, v3, v2), _blend(m2, v1, v0))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _decode(packed):
    """Values of packed codes (even, odd) in fp32: decode_nf4, on AMD without its selects.

    There each select keeps a lane mask in two scalar registers, which spill where a kernel decodes a tile of a GEMM.
    """
    if tl.target_info.is_hip():
        even = _blend_code((packed >> 4).to(tl.int32))
        odd = _blend_code((packed & 15).to(tl.int32))
    else:
        even, odd = decode_nf4(packed)
    return even, odd


@triton.jit
def _load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, block, inside, NESTED: tl.constexpr):
    """absmax of quantization blocks in fp32, 0 outside; double-quantized: map[code] · nested_absmax + offset."""
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + block // _GROUP, mask=inside, other=0.0)
        absmax = tl.load(map_table_ptr + absmax.to(tl.int32), mask=inside, other=0.0) * nested + tl.load(offset_ptr)
        absmax = tl.where(inside, absmax, 0.0)
    return absmax


@triton.jit
def _load_row_absmax(
    absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, rows, first_column, N, K,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """absmax of each pair of columns of a tile whose rows hold whole blocks, [ROWS, COLUMNS / 2]."""
    row_blocks = K // BLOCK_SIZE
    first = first_column // BLOCK_SIZE
    HALF: tl.constexpr = COLUMNS // 2
    if COLUMNS <= BLOCK_SIZE:
        block = rows * row_blocks + first
        absmax = _load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, block, rows < N, NESTED)
        absmax = tl.broadcast_to(absmax[:, None], [ROWS, HALF])
    else:
        SCALES: tl.constexpr = COLUMNS // BLOCK_SIZE
        blocks = first + tl.arange(0, SCALES)
        inside = (rows < N)[:, None] & (blocks < row_blocks)[None, :]
        block = rows[:, None] * row_blocks + blocks[None, :]
        absmax = _load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, block, inside, NESTED)
        absmax = tl.reshape(tl.broadcast_to(absmax[:, :, None], [ROWS, SCALES, HALF // SCALES]), [ROWS, HALF])
    return absmax


@triton.jit
def _load_weight(
    packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, first_row, first_column, N, K, row_bytes,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W of one tile, code · absmax in fp32, [ROWS, COLUMNS]; outside of [N, K] 0 if ALIGNED: rows hold whole blocks.

    row_bytes = K // 2 is an argument because the compiler sees the alignment of arguments only.
    """
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    if ALIGNED:
        at = first_column // 2 + tl.arange(0, COLUMNS // 2)
        inside = (rows < N)[:, None] & (at < row_bytes)[None, :]
        packed = tl.load(packed_ptr + rows[:, None] * row_bytes + at[None, :], mask=inside, other=0)
        even, odd = _decode(packed)
        absmax = _load_row_absmax(
            absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, rows, first_column, N, K,
            NESTED, BLOCK_SIZE, ROWS, COLUMNS,
        )  # fmt: skip
        w = tl.reshape(tl.join(even * absmax, odd * absmax), [ROWS, COLUMNS])
    else:
        # Clamped, not masked, which spills: what stands for weights outside meets zeros of x or is not stored.
        columns = tl.minimum(first_column + tl.arange(0, COLUMNS), K - 1)
        element = tl.minimum(rows, N - 1)[:, None] * K + columns[None, :]
        packed = tl.load(packed_ptr + element // 2)
        _, code = _decode(packed >> (4 - element % 2 * 4).to(tl.uint8))  # the nibble wanted, moved to the low half
        inside = tl.full([ROWS, COLUMNS], True, tl.int1)
        block = element // BLOCK_SIZE
        absmax = _load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, block, inside, NESTED)
        w = code * absmax
    return w


@triton.jit(do_not_specialize=["M"])
def _nf4_gemm_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, bias_ptr, add_ptr, y_ptr,
    M, N, K, row_bytes, stride_xm, per_split,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y[m, j] = Σ_i x[m, i] W[i, j] + b[j] + add[m, j], with Wᵀ in the place of W if TRANSPOSED.

    SPLIT: y[z, m, j] is the plain sum over the elements i of split z, fp32.
    """
    J = N if TRANSPOSED else K
    n_terms = K if TRANSPOSED else N
    first_j = tl.program_id(0) * BLOCK_J
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    if TRANSPOSED:
        acc = tl.zeros([BLOCK_J, BLOCK_M], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_J], dtype=tl.float32)
    begin = split * per_split
    for i in range(begin, tl.minimum(begin + per_split, n_terms), BLOCK_I):
        at = i + tl.arange(0, BLOCK_I)
        x = tl.load(x_rows + at[None, :], mask=(rows < M)[:, None] & (at < n_terms)[None, :], other=0.0)
        if TRANSPOSED:
            w = _load_weight(
                packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, first_j, i, N, K, row_bytes,
                ALIGNED, NESTED, BLOCK_SIZE, BLOCK_J, BLOCK_I,
            ).to(dtype)  # fmt: skip
            # Wᵀ is not formed: the tile is the left operand, read as it was decoded.
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")  # [J, I] @ [I, M] -> [J, M]
        else:
            w = _load_weight(
                packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, i, first_j, N, K, row_bytes,
                ALIGNED, NESTED, BLOCK_SIZE, BLOCK_I, BLOCK_J,
            ).to(dtype)  # fmt: skip
            acc = tl.dot(x, w, acc, input_precision="ieee")  # [M, I] @ [I, J] -> [M, J]
    if TRANSPOSED:
        acc = tl.trans(acc)
    columns = first_j + tl.arange(0, BLOCK_J)
    inside = (rows < M)[:, None] & (columns < J)[None, :]
    y_at = rows.to(tl.int64)[:, None] * J + columns[None, :]
    if SPLIT:
        y_at += split.to(tl.int64) * M * J
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < J, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(add_ptr + y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _add_splits_kernel(
    partial_ptr, bias_ptr, add_ptr, y_ptr, n, J, n_partials,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[m, j] = Σ_z partial[z, m, j] + b[j] + add[m, j], z ascending."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_partials):
        total += tl.load(partial_ptr + at, mask=at < n, other=0.0)
        partial_ptr += n
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % J, mask=at < n, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(add_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), at < n)


@triton.jit
def _nf4_gemv_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, bias_ptr, add_ptr, y_ptr,
    M, N, K, row_bytes, stride_xm,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = Σ_k x[m, k] code[n, k] absmax[n, k // BLOCK_SIZE] + b[n] + add[m, n]; W is never rounded to 16 bits."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    HALF: tl.constexpr = BLOCK_K // 2
    acc = tl.zeros([BLOCK_M, BLOCK_N, HALF], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        at = k // 2 + tl.arange(0, HALF)
        inside = (rows < N)[:, None] & (at < row_bytes)[None, :]
        packed = tl.load(packed_ptr + rows[:, None] * row_bytes + at[None, :], mask=inside, other=0)
        even, odd = _decode(packed)
        absmax = _load_row_absmax(
            absmax_ptr, nested_absmax_ptr, offset_ptr, map_table_ptr, rows, k, N, K,
            NESTED, BLOCK_SIZE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        columns = k + tl.arange(0, BLOCK_K)
        x_at = tokens.to(tl.int64)[:, None] * stride_xm + columns[None, :]
        x = tl.load(x_ptr + x_at, mask=(tokens < M)[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)
        x_even, x_odd = tl.split(tl.reshape(x, [BLOCK_M, HALF, 2]))
        products = even[None, :, :] * x_even[:, None, :] + odd[None, :, :] * x_odd[:, None, :]
        acc += products * absmax[None, :, :]
    y = tl.sum(acc, axis=2)  # [BLOCK_M, BLOCK_N]
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    y_at = tokens[:, None] * N + rows[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += tl.load(add_ptr + y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), inside)


def _parts(q: NF4Tensor) -> tuple[Any, ...]:
    """packed, absmax, nested_absmax, nested_offset and the 8-bit map, as kernels take them."""
    return q.packed, q.absmax, q.nested_absmax, q.nested_offset, map_on(q.device, signed=True) if q.nested else None


def aligned(q: NF4Tensor) -> bool:
    """Whether each row of W holds whole blocks (and so whole bytes)."""
    return q.shape[1] % q.block_size == 0


def _whole_rows(x: Tensor) -> Tensor:
    """x, or a copy of its few rows where they hold a multiple of 16 elements and begin elsewhere: 16-byte loads."""
    return x.contiguous() if x.shape[1] % 16 == 0 and x.stride(0) % 16 != 0 else x


def nf4_gemv(x: Tensor, q: NF4Tensor, bias: Tensor | None, add_to: Tensor | None) -> Tensor:
    """y = x Wᵀ + b + add_to in x's dtype.

    Args:
        x: [M <= 4, K] with unit stride along K.
        q: (N, K), aligned.
        bias: [N], contiguous, or None.
        add_to: [M, N], contiguous, or None.

    Returns:
        [M, N].
    """
    x = _whole_rows(x)
    (m, k), n = x.shape, q.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    launch(
        _nf4_gemv_kernel, (triton.cdiv(n, GEMV_ROWS),),
        x, *_parts(q), bias, add_to, y, m, n, k, k // 2, x.stride(0),
        NESTED=q.nested, BLOCK_SIZE=q.block_size, HAS_BIAS=bias is not None, ADD=add_to is not None,
        BLOCK_M=triton.next_power_of_2(m), BLOCK_N=GEMV_ROWS, BLOCK_K=GEMV_COLUMNS, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y


def nf4_gemm(x: Tensor, q: NF4Tensor, bias: Tensor | None, add_to: Tensor | None, *, transposed: bool) -> Tensor:
    """x W + b + add_to in x's dtype, with Wᵀ in the place of W if transposed.

    Args:
        x: [M, K] (transposed) or [M, N], unit stride along the last dimension.
        q: (N, K).
        bias: [N] or [K], contiguous, or None.
        add_to: of the result's shape, contiguous, or None.

    Returns:
        [M, N] (transposed) or [M, K].
    """
    (m, i), (n, k) = x.shape, q.shape
    j = n if transposed else k
    if m == 0 or j == 0:
        return x.new_empty(m, j)
    x = _whole_rows(x)
    most = 128 if j % 16 == 0 else 64  # rows of an odd number of results are stored one by one, and 128 of them spill
    tables = (GEMM_ODD if i % 16 or j % 16 else GEMM_16BIT, GEMM_FMA) if aligned(q) else (RAGGED_16BIT, RAGGED_FMA)
    tile = tables[on_fma_units(x.device, x.dtype)][min(max(16, triton.next_power_of_2(m)), most)]
    blocks = triton.cdiv(j, tile.block_j), triton.cdiv(m, tile.block_m)
    steps = max(1, triton.cdiv(i, tile.block_i))
    per_split = triton.cdiv(steps, max(1, min(TARGET_PROGRAMS // (blocks[0] * blocks[1]), steps))) * tile.block_i
    splits = max(1, triton.cdiv(i, per_split))
    y = torch.empty(m, j, dtype=x.dtype, device=x.device)
    split = splits > 1
    partial = torch.empty(splits, m, j, dtype=torch.float32, device=x.device) if split else y
    launch(
        _nf4_gemm_kernel, (*blocks, splits),
        x, *_parts(q), None if split else bias, None if split else add_to, partial,
        m, n, k, k // 2, x.stride(0), per_split,
        TRANSPOSED=transposed, ALIGNED=aligned(q), NESTED=q.nested, BLOCK_SIZE=q.block_size, SPLIT=split,
        HAS_BIAS=bias is not None and not split, ADD=add_to is not None and not split, **tile.meta,
    )  # fmt: skip
    if split:
        launch(
            _add_splits_kernel, (triton.cdiv(m * j, ADD_BLOCK),),
            partial, bias, add_to, y, m * j, j, splits,
            HAS_BIAS=bias is not None, ADD=add_to is not None, BLOCK=ADD_BLOCK, num_warps=4, num_stages=2,
        )  # fmt: skip
    return y
