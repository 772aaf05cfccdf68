"""The products that write [M, N]: the low-rank term alone, and a GEMM that starts from it.

    expand      y = scale · D ∘ (S Bᵀ) + b                # cuBLAS adds x Wᵀ to it afterwards: the β=1 route
    lora_gemm   y = x Wᵀ + scale · D ∘ (S Bᵀ) + b         # the low-rank term as one more K-step, one rounding

Names are the forward's, where D is all ones. dX = dY W + scale · D ∘ (dY B A) is the same product of other operands:
dY for x, Wᵀ for W, dS / scale = dY B for S, Aᵀ for B, without a bias and with D the mask.
The low-rank term comes first: it is scaled, masked and joined by the bias while the accumulator holds nothing else, so
that no second accumulator is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.kernels.lora_linear.triton_skinny import Dropout, scalar
from lora_ops.kernels.philox.triton_impl import keep_mask
from lora_ops.runtime.triton_launch import launch, on_fma_units

# Ranks of one step, whose operands stand in registers: the smallest that a matrix instruction takes.
BLOCK_R = 16
GROUP_M = 8  # blocks of rows that share their columns of y while those of W are in L2


@dataclass(frozen=True)
class Tile:
    """Tile [block_m, block_n] of the output; block_k elements of the sum a step (0: there is none)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Bandwidth-bound: 64 accumulator registers a thread, many programs.
EXPAND_16BIT = Tile(64, 128, 0, 4, 1)
EXPAND_FMA = Tile(32, 32, 0, 4, 1)
EXPAND_RAGGED = Tile(64, 64, 0, 4, 1)  # with 128 columns Triton 3.6 spills 8 bytes on sm_100
# (128 · 64 + 64 · 128) · 2 bytes = 32 KB a stage: 3 stages fit the 99 KB of sm_89 and sm_120.
GEMM = Tile(128, 128, 64, 8, 3)
# Rows of odd lengths load element by element, each with an address and a mask in registers: 24 elements a thread and
# step instead of 64.
GEMM_RAGGED = Tile(128, 64, 32, 8, 2)


@triton.jit
def _low_rank_tile(
    s_ptr, lora_b_ptr, bias_ptr, scale, seed_ptr, threshold, keep_scale, rows, columns, first_column, M, N, R,
    stride_bn, stride_br, SCALE_POINTER: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale · D ∘ (S Bᵀ) + b of one tile, float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):  # a few steps: buffers to pipeline them would be wasted
        ranks = r + tl.arange(0, BLOCK_R)
        s_inside = (rows < M)[:, None] & (ranks < R)[None, :]
        b_inside = (ranks < R)[:, None] & (columns < N)[None, :]
        from_ranks = ranks
        if ODD_RANK:  # masks that differ from rank to rank spill: load the last one for those beyond, which become 0
            s_inside = (rows < M)[:, None]
            b_inside = (columns < N)[None, :]
            from_ranks = tl.minimum(ranks, R - 1)
        s_at = rows.to(tl.int64)[:, None] * R + from_ranks[None, :]
        s = tl.load(s_ptr + s_at, mask=s_inside, other=0.0).to(DTYPE)
        b_at = from_ranks[:, None] * stride_br + columns[None, :] * stride_bn
        b = tl.load(lora_b_ptr + b_at, mask=b_inside, other=0.0).to(DTYPE)
        if ODD_RANK:
            s = tl.where((ranks < R)[None, :], s, 0.0)
            b = tl.where((ranks < R)[:, None], b, 0.0)
        acc = tl.dot(s, b, acc, input_precision="ieee")  # [BLOCK_M, R] @ [R, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    acc *= scalar(scale, SCALE_POINTER) * keep_scale
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, first_column, threshold, 0, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["threshold", "M"])
def _expand_kernel(
    s_ptr, lora_b_ptr, bias_ptr, y_ptr, scale, seed_ptr, threshold, keep_scale, M, N, R, stride_bn, stride_br,
    SCALE_POINTER: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = scale · D ∘ (S Bᵀ) + b."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    acc = _low_rank_tile(
        s_ptr, lora_b_ptr, bias_ptr, scale, seed_ptr, threshold, keep_scale, rows, columns, first_column, M, N, R,
        stride_bn, stride_br, SCALE_POINTER, HAS_BIAS, DROPOUT, dtype, ODD_RANK, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    y_at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptr + y_at, acc.to(dtype), (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_gemm_kernel(
    x_ptr, w_ptr, s_ptr, lora_b_ptr, bias_ptr, y_ptr, scale, seed_ptr, threshold, keep_scale, M, N, K, R,
    stride_xm, stride_wn, stride_wk, stride_bn, stride_br,
    SCALE_POINTER: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ODD_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + scale · D ∘ (S Bᵀ) + b."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * blocks_n)
    rows = (first_m + in_group % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = in_group // group * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = _low_rank_tile(
        s_ptr, lora_b_ptr, bias_ptr, scale, seed_ptr, threshold, keep_scale, rows, columns, first_column, M, N, R,
        stride_bn, stride_br, SCALE_POINTER, HAS_BIAS, DROPOUT, dtype, ODD_RANK, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    w_columns = w_ptr + columns.to(tl.int64)[None, :] * stride_wn
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        w_inside = (ks < K)[:, None] & (columns < N)[None, :]
        w = tl.load(w_columns + ks.to(tl.int64)[:, None] * stride_wk, mask=w_inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
    y_at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptr + y_at, acc.to(dtype), (rows < M)[:, None] & (columns < N)[None, :])


def expand(
    s: Tensor, lora_b: Tensor, bias: Tensor | None, scale: float | Tensor, dropout: Dropout, dtype: torch.dtype
) -> Tensor:
    """scale · D ∘ (S Bᵀ) + b in `dtype`.

    Args:
        s: [M, R], float32, contiguous; rounded to `dtype` as an operand.
        lora_b: [N, R], any strides; likewise.
        bias: [N], contiguous, or None.

    Returns:
        [M, N].
    """
    (m, r), n = s.shape, lora_b.shape[0]
    tile = EXPAND_FMA if on_fma_units(s.device, dtype) else EXPAND_16BIT if n % 16 == 0 else EXPAND_RAGGED
    y = torch.empty(m, n, dtype=dtype, device=s.device)
    launch(
        _expand_kernel, (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n)),
        s, lora_b, bias, y, scale, dropout.seed, dropout.threshold, dropout.keep_scale,
        m, n, r, *lora_b.stride(),
        SCALE_POINTER=isinstance(scale, Tensor), HAS_BIAS=bias is not None, DROPOUT=dropout.on, ODD_RANK=r % 16 != 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=BLOCK_R,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


def lora_gemm(
    x: Tensor, w: Tensor, s: Tensor, lora_b: Tensor, bias: Tensor | None, scale: float | Tensor, dropout: Dropout
) -> Tensor:
    """x Wᵀ + scale · D ∘ (S Bᵀ) + b in x's dtype, rounded once.

    Args:
        x: [M, K] with unit stride along K, of a dtype that has matrix instructions here (others: expand).
        w: [N, K], any strides.
        s, lora_b, bias: as `expand` takes them.

    Returns:
        [M, N].
    """
    (m, k), r, n = x.shape, s.shape[1], w.shape[0]
    # Of a size or stride Triton sees whether it is a multiple of 16; of W one of the strides is 1.
    whole = all(size % 16 == 0 for size in (n, k, x.stride(0), max(w.stride())))
    tile = GEMM if whole else GEMM_RAGGED
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    launch(
        _lora_gemm_kernel, (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        x, w, s, lora_b, bias, y, scale, dropout.seed, dropout.threshold, dropout.keep_scale,
        m, n, k, r, x.stride(0), *w.stride(), *lora_b.stride(),
        SCALE_POINTER=isinstance(scale, Tensor), HAS_BIAS=bias is not None, DROPOUT=dropout.on, ODD_RANK=r % 16 != 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        BLOCK_R=BLOCK_R, GROUP_M=GROUP_M,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
