"""AdamW's update in Triton, bit-equal to the reference: all slices of the same dtypes in one launch.

The kernel reads where its tensors are from a table of addresses, so that neither the number of launches nor that of
compiled kernels grows with the number of tensors.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.kernels.adamw.operands import Slices
from lora_ops.kernels.adamw.reference import BLOCK_SIZE
from lora_ops.kernels.philox.reference import LANES
from lora_ops.quant.blockwise8.triton_impl import map_on, thresholds_on
from lora_ops.quant.stream_triton import load_ragged, scale_blocks, store_ragged
from lora_ops.runtime import triton_launch
from lora_ops.runtime.triton_launch import launch

TILE = 2048  # with codes 16 elements a thread, so that those are 16 bytes
WARPS = {True: 4, False: 8}  # with codes, and without: on 4 ptxas spills for sm_89, with 1024 elements on 4 for sm_100
ALIGNMENT = 16  # bytes: the widest access

# Columns of the table, int64 [slices, FIELDS]: six addresses, then numbers; `start` is the slice's first program.
FIELDS = tl.constexpr(13)
_N, _ROW, _STREAM, _STEP, _FIRST, _SEED, _START = (tl.constexpr(i) for i in range(6, 13))
_CONSTANTS = tl.constexpr(8)
_BLOCK = tl.constexpr(BLOCK_SIZE)
_LANES = tl.constexpr(LANES)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _address(slice_ptr, column: tl.constexpr, dtype: tl.constexpr):
    """The tensor that a column of the table points at."""
    return tl.multiple_of(tl.load(slice_ptr + column).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _decode(codes_ptr, absmax_ptr, map_table_ptr, begin, e, left):
    """map[code] · absmax of its block [ROWS, BLOCK]; 0 from element `left` on."""
    row = tl.arange(0, e.shape[0])
    scale = tl.load(absmax_ptr + begin // _BLOCK + row, mask=row * _BLOCK < left, other=0.0)
    code = load_ragged(codes_ptr + begin, e, left).to(tl.int32)
    return tl.where(e < left, tl.load(map_table_ptr + code) * scale[:, None], 0.0)


@triton.jit
def _encode(x, codes_ptr, absmax_ptr, threshold_table_ptr, begin, e, left):
    """Store x [ROWS, BLOCK] as codes and absmax."""
    row = tl.arange(0, e.shape[0])
    scaled, absmax, _, _ = scale_blocks(x, left)
    tl.store(absmax_ptr + begin // _BLOCK + row, absmax, mask=row * _BLOCK < left)
    code = tl.zeros([e.shape[0], e.shape[1]], dtype=tl.int32)  # thresholds exceeded, by bisection of all 255
    for i in tl.static_range(8):
        code += tl.where(scaled > tl.load(threshold_table_ptr + code + ((128 >> i) - 1)), 128 >> i, 0)
    store_ragged(codes_ptr + begin, e, code.to(tl.uint8), left)


@triton.jit
def _round_stochastically(x, slice_ptr, begin):
    """fp32 [ROWS, BLOCK] to values of bf16, as kernels/adamw/reference.py: 16 bits an element, 8 elements a Philox."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    GROUPS: tl.constexpr = ROWS * BLOCK // _LANES
    group = (tl.load(slice_ptr + _FIRST) + begin) // _LANES + tl.arange(0, GROUPS)  # int64
    zeros = tl.zeros([GROUPS], dtype=tl.uint32)
    stream = zeros + tl.load(slice_ptr + _STREAM).to(tl.uint32)
    step = zeros + tl.load(slice_ptr + _STEP).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(slice_ptr + _SEED), group.to(tl.uint32), stream, step, (group >> 32).to(tl.uint32)
    )
    # join appends the fastest axis: the outer pair (w0 | w2) is the high bit of the word's number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, BLOCK // 2)
    lanes = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, BLOCK)  # the low half is the even lane
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + lanes) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, rounded, x)


@triton.jit(do_not_specialize=["count", "steps"])
def _adamw_kernel(
    slices_ptr, constants_ptr, m_map_table_ptr, v_map_table_ptr, m_threshold_table_ptr, v_threshold_table_ptr,
    count, steps, PARAM: tl.constexpr, GRAD: tl.constexpr, CODED: tl.constexpr, STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE elements of one of `count` slices; `steps` halvings find which."""
    program = tl.program_id(0)
    low = program * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(slices_ptr + middle * FIELDS + _START) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    slice_ptr = slices_ptr + low * FIELDS
    begin = (program - tl.load(slice_ptr + _START)) * TILE  # int64
    left = tl.minimum(tl.load(slice_ptr + _N) - begin, TILE).to(tl.int32)
    e = tl.arange(0, TILE // _BLOCK)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]  # [TILE / BLOCK, BLOCK]

    row_ptr = constants_ptr + tl.load(slice_ptr + _ROW) * _CONSTANTS
    decay, beta1c, beta2, beta2c = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    eps, step_size, bias2, sign = tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 6), tl.load(row_ptr + 7)

    p_ptr, g_ptr = _address(slice_ptr, 0, PARAM), _address(slice_ptr, 1, GRAD)
    p = load_ragged(p_ptr + begin, e, left).to(tl.float32)
    g = load_ragged(g_ptr + begin, e, left).to(tl.float32) * sign
    STATE: tl.constexpr = tl.uint8 if CODED else tl.float32
    m_ptr, v_ptr = _address(slice_ptr, 2, STATE), _address(slice_ptr, 3, STATE)
    if CODED:
        m_absmax_ptr, v_absmax_ptr = _address(slice_ptr, 4, tl.float32), _address(slice_ptr, 5, tl.float32)
        m = _decode(m_ptr, m_absmax_ptr, m_map_table_ptr, begin, e, left)
        v = _decode(v_ptr, v_absmax_ptr, v_map_table_ptr, begin, e, left)
    else:
        m = load_ragged(m_ptr + begin, e, left)
        v = load_ragged(v_ptr + begin, e, left)

    m += (g - m) * beta1c
    v = v * beta2 + g * beta2c * g
    p = p * decay - tl.div_rn(m * step_size, tl.sqrt_rn(v) * bias2 + eps)

    if CODED:
        _encode(m, m_ptr, m_absmax_ptr, m_threshold_table_ptr, begin, e, left)
        _encode(v, v_ptr, v_absmax_ptr, v_threshold_table_ptr, begin, e, left)
    else:
        store_ragged(m_ptr + begin, e, m, left)
        store_ragged(v_ptr + begin, e, v, left)
    if STOCHASTIC:
        p = _round_stochastically(p, slice_ptr, begin)
    store_ragged(p_ptr + begin, e, p.to(PARAM), left)


def adamw_(*, slices: Slices) -> None:
    """Update every slice in place, with one launch for each combination of dtypes; see op.py for the arguments."""
    params, grads, exp_avgs, exp_avg_sqs, absmaxes, constants, index, seed = slices
    scales = iter(absmaxes)
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[list[Tensor], list[int]]]] = defaultdict(list)
    for *operands, place in zip(params, grads, exp_avgs, exp_avg_sqs, index.tolist(), strict=True):
        coded = operands[2].dtype == torch.uint8
        operands += [next(scales), next(scales)] if coded else []
        if operands[0].numel():
            groups[operands[0].dtype, operands[1].dtype, coded].append((operands, place))
    for (param_dtype, grad_dtype, coded), group in groups.items():
        _launch(group, constants, param_dtype, grad_dtype, coded, seed)


def _launch(
    slices: list[tuple[list[Tensor], list[int]]], constants: Tensor, param_dtype: torch.dtype, grad_dtype: torch.dtype,
    coded: bool, seed: int | None,
) -> None:  # fmt: skip
    device = slices[0][0][0].device
    table, start = [], 0
    for operands, place in slices:
        addresses = [t.data_ptr() for t in operands] + [0] * (6 - len(operands))
        table.append([*addresses, operands[0].numel(), *place, seed or 0, start])
        start += triton.cdiv(operands[0].numel(), TILE)
    maps = map_on(device, signed=True), map_on(device, signed=False)
    thresholds = thresholds_on(device, signed=True), thresholds_on(device, signed=False)
    launch(
        _adamw_kernel, (start,), _upload(torch.tensor(table), device), _upload(constants, device), *maps, *thresholds,
        len(table), (len(table) - 1).bit_length(),
        PARAM=_DTYPES[param_dtype], GRAD=_DTYPES[grad_dtype], CODED=coded,
        STOCHASTIC=seed is not None and param_dtype == torch.bfloat16, TILE=TILE, num_warps=WARPS[coded],
        enable_fp_fusion=False, reaches=[t for operands, _ in slices for t in operands],
    )  # fmt: skip


def _upload(t: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, or the host would wait for all that the stream has still to do."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def declines(op: str, lead: Tensor, *, slices: Slices) -> str | None:
    """Why this backend cannot serve the call, or None."""
    for p, g in zip(slices.params, slices.grads, strict=True):
        if g.dtype not in (p.dtype, torch.float32):
            return f"triton kernels take gradients in the parameter's dtype or float32, not {g.dtype} for {p.dtype}"
    for t in itertools.chain.from_iterable(slices[:5]):
        if t.data_ptr() % ALIGNMENT:
            return f"triton kernels take tensors at multiples of {ALIGNMENT} bytes"
    return triton_launch.declines(lead.device, lead.dtype)


IMPLS: dict[str, Callable] = {"adamw_": adamw_}
