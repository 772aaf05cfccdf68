"""Products of an activation with a matrix of rank R, each with one read of the activation.

With D = mask · keep_scale (all ones without dropout), and `ds` = dS / scale = dY B, since scale multiplies sums:
    reduce_rows    S = (D ∘ x) Aᵀ                      # and ds, as the same product of dY and Bᵀ
    reduce_columns dA = scale · dsᵀ (D ∘ x)            # and dB, as the same product of dY and S; Σ_m dY, db
    reduce_both    ds = dY B, dB = scale · dYᵀ S, db   # from one read of dY

They are bandwidth-bound: at R = 16 an element takes 2 R = 32 FLOPs, 16 a byte, where an H200 is balanced at 206.
Sums over several programs go through a workspace and are added in one fixed order by a second kernel: no atomics, so
that results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.kernels.philox import keep_scale, threshold
from lora_ops.kernels.philox.triton_impl import keep_mask
from lora_ops.runtime.dispatch import as_output
from lora_ops.runtime.triton_launch import launch, on_fma_units

# Programs that a launch aims at when it splits a sum: about one an SM of an H100/H200 (132), and the same number on
# every chip, so that results do not depend on the chip.
TARGET_PROGRAMS = 128
REDUCE_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """Tile [block_m, block_k] of the activation, rows and columns; num_stages tiles of it are in flight."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # of NVIDIA; None: ptxas may spill a little, if two programs then fit an SM

    @property
    def options(self) -> dict[str, int | None]:
        """As launch arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


Tiles = dict[int, Tile]

# By padded rank. Every tile fits the 99 KB of sm_89/120 and, with one stage less in memory, the 64 KB of gfx942:
# (x tile + float32 A tile) · stages. block_k shrinks as the A tile grows with R; 8 warps where the accumulator
# [block_m, R] would not fit into 64 registers a thread of 4.
ROWS_16BIT = {
    16: Tile(64, 128, 8, 3),  # (16 + 8) · 3 = 72 KB; 32 KB of x in flight hide 0.8 µs at 4.8 TB/s over 132 SMs
    32: Tile(32, 64, 4, 2),
    64: Tile(64, 32, 8, 4),
    128: Tile(64, 32, 8, 3),
    256: Tile(64, 16, 8, 2),
}
COLUMNS_16BIT = {
    16: Tile(64, 128, 8, 3),  # with 4 warps Triton 3.6 spills on sm_80
    32: Tile(32, 128, 4, 3),
    # Triton 3.8 spills 8 bytes on sm_120 to fit two programs an SM. A launch has about one an SM (TARGET_PROGRAMS): on
    # chips with as many SMs the registers cost nothing; on smaller ones a second program no longer hides the first
    # one's loads.
    64: Tile(32, 128, 8, 2, maxnreg=255),
    128: Tile(32, 64, 8, 2),
    256: Tile(16, 64, 8, 2),
}
# block_k is wide because each block of columns writes its own partial ds; 8 warps because Triton 3.6 spills with 4.
BOTH_16BIT = {
    16: Tile(32, 256, 8, 3),
    32: Tile(16, 128, 4, 3),
}
# Where R is no multiple of 16 its operands load element by element, and other tiles do not spill.
ROWS_ODD = ROWS_16BIT | {64: Tile(64, 32, 4, 3), 256: Tile(32, 16, 8, 2)}
COLUMNS_ODD = COLUMNS_16BIT | {128: Tile(64, 64, 8, 2), 256: Tile(16, 32, 8, 2)}
# Where rows of the activation are no multiple of 16 elements, they load element by element, and gfx942 keeps a mask of
# each in two scalar registers: few elements a thread, of any rank. With rows of 32 elements Triton 3.8 spills there
# from rank 17 on; with 8 warps, or without maxnreg, rank 24 spills on sm_100.
ROWS_RAGGED = {
    16: Tile(64, 32, 4, 2),
    32: Tile(64, 16, 4, 2, maxnreg=255),
    64: Tile(64, 16, 8, 2),
    128: Tile(64, 16, 8, 2),
    256: Tile(32, 16, 8, 2),
}
COLUMNS_RAGGED = {
    16: Tile(32, 64, 4, 2),
    32: Tile(16, 64, 4, 2),
    64: Tile(16, 64, 8, 2),
    128: Tile(16, 64, 8, 2),
    256: Tile(16, 32, 8, 2),
}
BOTH_RAGGED = {
    16: Tile(32, 64, 4, 2),
    32: Tile(16, 128, 4, 3),
}
# Plain FMA units (triton_launch.on_fma_units), which hold a step of both operands in registers: steps of 16. They are
# compute-bound from R = 16 on, so a second read of dY costs nothing.
ROWS_FMA = {
    **dict.fromkeys((16, 32, 64), Tile(32, 16, 4, 2)),
    128: Tile(16, 16, 4, 2),
    256: Tile(8, 16, 8, 2),
}
COLUMNS_FMA = {
    **dict.fromkeys((16, 32, 64), Tile(16, 32, 4, 2)),
    128: Tile(16, 16, 8, 2),
    256: Tile(16, 16, 8, 1),
}


def reads_once(dy: Tensor, r: int) -> bool:
    """Whether `reduce_both` serves; else `reduce_rows` and `reduce_columns` read the activation once each.

    It pays up to rank 32: partial sums take R · 8 · (1 / block_k + 1 / rows of a split) bytes an element, within L2 as
    long as they are young, the second read 2 bytes from DRAM. Above, the tile of B no longer fits the registers.
    """
    return not on_fma_units(dy.device, dy.dtype) and padded_rank(r) in BOTH_16BIT


def padded_rank(r: int) -> int:
    """The power of two, at least 16 (the smallest matrix instruction), that holds r."""
    return max(16, triton.next_power_of_2(r))


def _rank_meta(r: int) -> dict[str, int]:
    """What the kernels know of a rank when they are compiled, as launch arguments."""
    return {"ODD_RANK": r % 16 != 0, "BLOCK_R": padded_rank(r)}


@dataclass(frozen=True)
class Dropout:
    """The mask as kernels take it; `seed` is read by them, because reading it here would wait for the GPU."""

    seed: Tensor | None
    threshold: int
    keep_scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        """Without a seed nothing is dropped."""
        return cls(None, 0, 1.0) if seed is None else cls(seed, threshold(p), keep_scale(p))

    @property
    def on(self) -> bool:
        return self.seed is not None


def scale_argument(scale: Tensor, device: torch.device) -> float | Tensor:
    """A number if `scale` lives on the CPU, else the tensor, on `device`: fetching it would wait for the GPU."""
    return scale.item() if scale.device.type == "cpu" else scale.to(device)


@triton.jit
def scalar(value, POINTER: tl.constexpr):
    """A float32 scalar given by value or by pointer."""
    if POINTER:
        return tl.load(value).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles one branch only in this form
        return value


@triton.jit
def _ranks(R, ODD_RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Ranks to load, and below which number a rank is one of the operand's.

    Where R is no multiple of 16, a mask over ranks differs from element to element, and the predicates spill. There the
    last rank stands for those beyond it, which are summed by themselves and never stored.
    """
    ranks = tl.arange(0, BLOCK_R)
    if ODD_RANK:
        return tl.minimum(ranks, R - 1), BLOCK_R
    else:  # noqa: RET505 - Triton compiles one branch only in this form
        return ranks, R


@triton.jit
def _load_x(
    x_ptr, rows, first_column, M, K, stride_xm, seed_ptr, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """mask ∘ x of one tile, 0 outside of [M, K]; keep_scale is left to the end of the sum, in float32."""
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, first_column, threshold, 0, BLOCK_M, BLOCK_K)
        x = tl.where(keep, x, 0.0)
    return x


@triton.jit(do_not_specialize=["threshold", "M"])
def _reduce_rows_kernel(
    x_ptr, lora_a_ptr, s_ptr, seed_ptr, threshold, keep_scale, M, K, R, stride_xm, stride_ar, stride_ak,
    columns_per_split, DROPOUT: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S[z, m, r] = Σ_k (D ∘ x)[m, k] A[r, k] over the columns k of split z."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    from_ranks, limit = _ranks(R, ODD_RANK, BLOCK_R)
    begin = split * columns_per_split
    s = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(begin, tl.minimum(begin + columns_per_split, K), BLOCK_K):
        x = _load_x(x_ptr, rows, k, M, K, stride_xm, seed_ptr, threshold, DROPOUT, BLOCK_M, BLOCK_K)
        columns = k + tl.arange(0, BLOCK_K)
        a = tl.load(
            lora_a_ptr + from_ranks[:, None] * stride_ar + columns[None, :] * stride_ak,
            mask=(ranks < limit)[:, None] & (columns < K)[None, :],
            other=0.0,
        ).to(x.dtype)
        s = tl.dot(x, tl.trans(a), s, input_precision="ieee")  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, R] -> [BLOCK_M, R]
    s_rows = split.to(tl.int64) * M + rows
    tl.store(s_ptr + s_rows[:, None] * R + ranks[None, :], s * keep_scale, (rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["threshold", "M"])
def _reduce_columns_kernel(
    x_ptr, ds_ptr, dlora_a_ptr, sum_ptr, seed_ptr, threshold, M, K, R, stride_xm, stride_dar, stride_dak,
    rows_per_split, DROPOUT: tl.constexpr, SUM: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA[z, r, k] = Σ_m ds[m, r] (mask ∘ x)[m, k] and sum[z, k] = Σ_m x[m, k] over the rows m of split z."""
    first = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    columns = first + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    from_ranks, limit = _ranks(R, ODD_RANK, BLOCK_R)
    begin = split * rows_per_split
    da = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    for m in range(begin, tl.minimum(begin + rows_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        x = _load_x(x_ptr, rows, first, M, K, stride_xm, seed_ptr, threshold, DROPOUT, BLOCK_M, BLOCK_K)
        ds = tl.load(
            ds_ptr + rows.to(tl.int64)[:, None] * R + from_ranks[None, :],
            mask=(rows < M)[:, None] & (ranks < limit)[None, :],
            other=0.0,
        ).to(x.dtype)
        da = tl.dot(tl.trans(ds), x, da, input_precision="ieee")  # [R, BLOCK_M] @ [BLOCK_M, BLOCK_K] -> [R, BLOCK_K]
        if SUM:
            total += tl.sum(x.to(tl.float32), axis=0)
    dlora_a_ptr += split.to(tl.int64) * K * R
    da_at = ranks[:, None] * stride_dar + columns.to(tl.int64)[None, :] * stride_dak
    tl.store(dlora_a_ptr + da_at, da, (ranks < R)[:, None] & (columns < K)[None, :])
    if SUM:
        tl.store(sum_ptr + split.to(tl.int64) * K + columns, total, columns < K)


@triton.jit(do_not_specialize=["M"])
def _reduce_both_kernel(
    dy_ptr, lora_b_ptr, s_ptr, ds_ptr, dlora_b_ptr, sum_ptr, M, N, R, stride_dym, stride_bn, stride_br, rows_per_split,
    SUM: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of the columns n of block j and the rows m of split z, with one read of dY:

    ds[j, m, r] = Σ_n dY[m, n] B[n, r],   dB[z, n, r] = Σ_m dY[m, n] S[m, r],   sum[z, n] = Σ_m dY[m, n].
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    first = block * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    from_ranks, limit = _ranks(R, ODD_RANK, BLOCK_R)
    begin = split * rows_per_split
    db = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    db_inside = (ranks < R)[:, None] & (columns < N)[None, :]
    b_at = from_ranks[:, None] * stride_br + columns[None, :] * stride_bn
    b_inside = (ranks < limit)[:, None] & (columns < N)[None, :]
    b = tl.load(lora_b_ptr + b_at, mask=b_inside, other=0.0).to(dy_ptr.dtype.element_ty)
    for m in range(begin, tl.minimum(begin + rows_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        dy = _load_x(dy_ptr, rows, first, M, N, stride_dym, dy_ptr, 0, False, BLOCK_M, BLOCK_N)
        ds_inside = (rows < M)[:, None] & (ranks < R)[None, :]
        s_rows = rows.to(tl.int64)[:, None] * R
        ds = tl.dot(dy, tl.trans(b), input_precision="ieee")  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, R] -> [BLOCK_M, R]
        tl.store(ds_ptr + block.to(tl.int64) * M * R + s_rows + ranks[None, :], ds, ds_inside)
        s_inside = (rows < M)[:, None] & (ranks < limit)[None, :]
        s = tl.load(s_ptr + s_rows + from_ranks[None, :], mask=s_inside, other=0.0).to(dy.dtype)
        db = tl.dot(tl.trans(s), dy, db, input_precision="ieee")  # [R, BLOCK_M] @ [BLOCK_M, BLOCK_N] -> [R, BLOCK_N]
        if SUM:
            total += tl.sum(dy.to(tl.float32), axis=0)
    db_at = columns.to(tl.int64)[None, :] * R + ranks[:, None]
    tl.store(dlora_b_ptr + split.to(tl.int64) * N * R + db_at, db, db_inside)
    if SUM:
        tl.store(sum_ptr + split.to(tl.int64) * N + columns, total, columns < N)


@triton.jit
def _add_partials_kernel(
    partial_ptr, out_ptr, scale, factor, n, n_partials, SCALE_POINTER: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = scale · factor · Σ_z partial[z, i], z ascending."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_partials):
        total += tl.load(partial_ptr + at, mask=at < n, other=0.0)
        partial_ptr += n
    total *= scalar(scale, SCALE_POINTER) * factor
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), at < n)


def _ragged(x: Tensor) -> bool:
    """Whether Triton cannot see that rows of x hold, and begin at, a multiple of 16 elements."""
    return x.shape[1] % 16 != 0 or x.stride(0) % 16 != 0


def _tile(table_16bit: Tiles, table_odd: Tiles, table_ragged: Tiles, table_fma: Tiles, x: Tensor, r: int) -> Tile:
    table = table_odd if r % 16 else table_16bit
    if _ragged(x):
        table = table_ragged
    if on_fma_units(x.device, x.dtype):
        table = table_fma
    return table[padded_rank(r)]


def _per_split(total: int, block: int, other_programs: int) -> tuple[int, int]:
    """Elements of a sum of `total` that one split takes, a multiple of block, and the number of splits."""
    blocks = max(1, triton.cdiv(total, block))  # an empty sum is a program that writes zeros
    splits = max(1, min(TARGET_PROGRAMS // max(other_programs, 1), blocks))
    per_split = triton.cdiv(blocks, splits) * block
    return per_split, max(1, triton.cdiv(total, per_split))


def add_partials(
    partial: Tensor, dtype: torch.dtype, scale: float | Tensor = 1.0, factor: float = 1.0, *, transposed: bool = False
) -> Tensor:
    """scale · factor · Σ_z partial[z] in `dtype`; partial is float32 [Z, ...]."""
    if partial.shape[0] == 1 and dtype == torch.float32 and not isinstance(scale, Tensor) and scale * factor == 1.0:
        return as_output(partial, partial.shape[1:])
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    pointer = isinstance(scale, Tensor)
    launch(
        _add_partials_kernel, (triton.cdiv(out.numel(), REDUCE_BLOCK),),
        partial, out, scale, factor, out.numel(), partial.shape[0],
        SCALE_POINTER=pointer, BLOCK=REDUCE_BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def reduce_rows(x: Tensor, lora_a: Tensor, dropout: Dropout) -> Tensor:
    """S = (D ∘ x) Aᵀ, float32.

    Args:
        x: [M, K] with unit stride along K.
        lora_a: [R, K], any strides; rounded to x's dtype as an operand.

    Returns:
        [M, R].
    """
    (m, k), r = x.shape, lora_a.shape[0]
    tile = _tile(ROWS_16BIT, ROWS_ODD, ROWS_RAGGED, ROWS_FMA, x, r)
    blocks = triton.cdiv(m, tile.block_m)
    per_split, splits = _per_split(k, tile.block_k, blocks)
    partial = torch.empty(splits, m, r, dtype=torch.float32, device=x.device)
    launch(
        _reduce_rows_kernel, (blocks, splits),
        x, lora_a, partial, dropout.seed, dropout.threshold, dropout.keep_scale,
        m, k, r, x.stride(0), *lora_a.stride(), per_split,
        DROPOUT=dropout.on, **_rank_meta(r), BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, **tile.options,
    )  # fmt: skip
    return add_partials(partial, torch.float32)


def reduce_columns(
    x: Tensor, ds: Tensor, dropout: Dropout, scale: float | Tensor, dtype: torch.dtype,
    *, rank_first: bool, sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dA = scale · dsᵀ (D ∘ x) in `dtype`, and Σ_m x in sum_dtype if that is given.

    Args:
        x: [M, K] with unit stride along K.
        ds: [M, R], float32, contiguous; rounded to x's dtype as an operand.
        rank_first: the result is [R, K], as dA is; else [K, R], as is dB with dY for x and S for ds.

    Returns:
        dA and the sum [K], or None.
    """
    (m, k), r = x.shape, ds.shape[1]
    tile = _tile(COLUMNS_16BIT, COLUMNS_ODD, COLUMNS_RAGGED, COLUMNS_FMA, x, r)
    blocks = triton.cdiv(k, tile.block_k)
    per_split, splits = _per_split(m, tile.block_m, blocks)
    partial = torch.empty(splits, *((r, k) if rank_first else (k, r)), dtype=torch.float32, device=x.device)
    sums = None if sum_dtype is None else torch.empty(splits, k, dtype=torch.float32, device=x.device)
    launch(
        _reduce_columns_kernel, (blocks, splits),
        x, ds, partial, sums, dropout.seed, dropout.threshold,
        m, k, r, x.stride(0), *((k, 1) if rank_first else (1, r)), per_split,
        DROPOUT=dropout.on, SUM=sums is not None, **_rank_meta(r),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, **tile.options,
    )  # fmt: skip
    dlora_a = add_partials(partial, dtype, scale, dropout.keep_scale)
    return dlora_a, None if sums is None or sum_dtype is None else add_partials(sums, sum_dtype)


def reduce_both(
    dy: Tensor, lora_b: Tensor, s: Tensor, scale: float | Tensor, dtype: torch.dtype,
    *, sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """ds = dY B in float32, dB = scale · dYᵀ S in `dtype`, and Σ_m dY in sum_dtype if that is given: one read of dY.

    Args:
        dy: [M, N] with unit stride along N; `reads_once(dy, R)`.
        lora_b: [N, R], any strides; rounded to dy's dtype as an operand.
        s: [M, R], float32, contiguous; rounded to dy's dtype as an operand.

    Returns:
        ds [M, R], dB [N, R], and the sum [N] or None.
    """
    (m, n), r = dy.shape, lora_b.shape[1]
    tile = (BOTH_RAGGED if _ragged(dy) else BOTH_16BIT)[padded_rank(r)]
    blocks = triton.cdiv(n, tile.block_k)
    per_split, splits = _per_split(m, tile.block_m, blocks)

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dy.device)

    ds, dlora_b = workspace(blocks, m, r), workspace(splits, n, r)
    sums = None if sum_dtype is None else workspace(splits, n)
    launch(
        _reduce_both_kernel, (blocks, splits),
        dy, lora_b, s, ds, dlora_b, sums, m, n, r, dy.stride(0), *lora_b.stride(), per_split,
        SUM=sums is not None, **_rank_meta(r), BLOCK_M=tile.block_m, BLOCK_N=tile.block_k, **tile.options,
    )  # fmt: skip
    total = None if sums is None or sum_dtype is None else add_partials(sums, sum_dtype)
    return add_partials(ds, torch.float32), add_partials(dlora_b, dtype, scale), total
