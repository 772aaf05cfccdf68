"""AdamW's kernel: bit-equal to the reference, within the tensors of its table, one launch, in the least bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ops
from lora_ops.kernels.adamw import Slice, adamw_, op, triton_impl
from lora_ops.quant.blockwise8.reference import dequantize_blockwise8
from lora_ops.runtime.triton_launch import Launch, record_launches
from tests.gpu_proof.interpreter import OutOfBounds, count_traffic, run_virtually
from tests.gpu_proof.mutant import mutant
from tests.kernels.test_adamw import ROWS, assert_same, make, run

TILE = triton_impl.TILE
PAIRS = [(p, g) for p in (torch.float32, torch.bfloat16, torch.float16) for g in {p, torch.float32}]
slices = st.builds(
    lambda pair, **kwargs: make(dtype=pair[0], grad_dtype=pair[1], **kwargs),
    pair=st.sampled_from(PAIRS),
    n=st.one_of(st.sampled_from([0, 1, 15, 255, 256, 257, TILE, TILE + 1, 2 * TILE + 300]), st.integers(0, 3000)),
    bits=st.sampled_from([32, 8]),
    seed=st.integers(0, 1000),
    row=st.integers(0, 1),
    stream=st.integers(0, 2**31),
    step=st.integers(1, 10**6),
    first=st.sampled_from([0, 256, 2**36]),
)


@settings(max_examples=60)
@given(many=st.lists(slices, min_size=1, max_size=6), seed=st.sampled_from([None, 0, 2**63 - 1]))
def test_bit_equal(many: list[Slice], seed: int | None) -> None:
    many = [*many, vanishing(300)]
    for ours, expected in zip(run(many, "triton", seed), run(many, "reference", seed), strict=True):
        assert_same(ours, expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_one_launch_and_the_least_bytes(bits: int) -> None:
    many = [make(n, bits, torch.float32, torch.float32, n) for n in (5000, 4096, 20_000, 7, 256, 9000)]
    states = ("exp_avg", "exp_avg_sq", *(("exp_avg_absmax", "exp_avg_sq_absmax") if bits == 8 else ()))
    least = sum(3 * s.param.nbytes + 2 * sum(getattr(s, name).nbytes for name in states) for s in many)
    with count_traffic() as t:
        adamw_(many, ROWS)
    assert t.launches == 1
    assert t.total <= 1.05 * least, t


def test_dtypes_are_launched_apart() -> None:
    many = [make(300, bits, dtype, dtype, 1) for bits in (32, 8, 8) for dtype in (torch.float32, torch.bfloat16)]
    with record_launches() as record:
        adamw_(many, ROWS)
    assert len(record.launches) == 4


def vanishing(n: int) -> Slice:
    """A slice whose gradient takes m to zero, so that any other value in its last block shows in absmax."""
    s = make(n, 8, torch.bfloat16, torch.float32, n, row=1)
    assert s.exp_avg_absmax is not None
    s.grad = dequantize_blockwise8(s.exp_avg, s.exp_avg_absmax, 256, True)  # β₁ = 0.5, and the sign is turned
    return s


def test_what_it_declines() -> None:
    odd = make(300, 32, torch.float32, torch.bfloat16, 0)
    with pytest.raises(lora_ops.BackendError, match="gradients in the parameter's dtype or float32"):
        adamw_([odd], ROWS)
    shifted = make(300, 32, torch.float32, torch.float32, 0)
    shifted.param = torch.zeros(301)[1:]
    with pytest.raises(lora_ops.BackendError, match="multiples of 16 bytes"):
        adamw_([shifted], ROWS)


def huge(module: object, bits: int, n: int) -> tuple[Launch, list[tuple[int, int]]]:
    """A launch over a small slice and one of n elements that nothing lies behind, and the addresses of both."""
    sizes = [4, 4, 4, 4] if bits == 32 else [4, 4, 1, 1, 4, 4]
    reaches, table, start = [], [], 0
    for count in (300, n):
        spans = []
        for i, size in enumerate(sizes):
            begin = (100 + len(reaches)) << 48
            spans.append((begin, begin + size * (count if i < 4 else -(-count // 256))))
            reaches.append(spans[-1])
        addresses = [begin for begin, _ in spans] + [0] * (6 - len(spans))
        table.append([*addresses, count, 0, 1, 1, 0, 0, start])
        start += -(-count // TILE)
    cpu = torch.device("cpu")
    tables = [f(cpu, signed=s) for f in (triton_impl.map_on, triton_impl.thresholds_on) for s in (True, False)]
    meta = {"PARAM": triton_impl.tl.float32, "GRAD": triton_impl.tl.float32, "CODED": bits == 8, "STOCHASTIC": False}
    args = (torch.tensor(table), torch.tensor(ROWS), *tables, 2, 1)
    return Launch(module._adamw_kernel, (start,), args, {**meta, "TILE": TILE}), reaches  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", [32, 8])
def test_addresses_of_huge_tensors(bits: int) -> None:
    launch, reaches = huge(triton_impl, bits, 3 * 2**31 + 77)
    run_virtually(launch, reaches=reaches)


@pytest.mark.parametrize(
    ("old", "new", "test"),
    [
        ("* sign", "", "bits"),
        ("(g - m) * beta1c", "(g - m) * (1 - beta2)", "bits"),
        ("w0, w2), tl.join(w1, w3)", "w0, w1), tl.join(w2, w3)", "bits"),
        ("scale[:, None], 0.0)", "scale[:, None], tl.load(map_table_ptr + code) * scale[:, None])", "bits"),
        ("<= program", "< program", "bits"),
        ("code.to(tl.uint8), left)", "code.to(tl.uint8), left - 1)", "bits"),
        ("mask=row * _BLOCK < left)\n    code", "mask=row * _BLOCK <= left)\n    code", "bounds"),
        ("begin = (program - tl.load(slice_ptr + _START)) * TILE", "begin = ((program - tl.load(slice_ptr + _START)) * "
         "TILE).to(tl.int32)", "huge"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_mutants(old: str, new: str, test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutant(triton_impl, tmp_path, (old, new))
    if test == "huge":
        launch, reaches = huge(broken, 8, 3 * 2**31 + 77)
        with pytest.raises(OutOfBounds):
            run_virtually(launch, reaches=reaches)
        return
    monkeypatch.setitem(op._adamw._impls, "triton", broken.adamw_)
    many = [make(n, bits, torch.bfloat16, torch.float32, n, row=1) for n in (TILE, 700, 512) for bits in (32, 8)]
    many.append(vanishing(300))
    if test == "bounds":
        with pytest.raises(OutOfBounds):
            run(many, "triton", 3)
        return
    broken_bits = [_bits(s) for s in run(many, "triton", 3)]
    assert broken_bits != [_bits(s) for s in run(many, "reference", 3)]


def _bits(s: Slice) -> list[list[int]]:
    tensors = (s.param, s.exp_avg, s.exp_avg_sq, s.exp_avg_absmax, s.exp_avg_sq_absmax)
    return [t.view(torch.uint8).tolist() for t in tensors if t is not None]
