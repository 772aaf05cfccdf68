"""The interpreter harness itself: its patches are needed and right, and it catches kernels broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ops.functional import quantize_nf4
from lora_ops.quant.nf4.codec import triton_impl
from lora_ops.quant.nf4.codec.reference import dequantize_nf4
from lora_ops.runtime.triton_launch import launch, record_launches
from tests.gpu_proof import interpreter
from tests.gpu_proof.gates import nf4_codec
from tests.gpu_proof.interpreter import AtomicUsed, OutOfBounds, count_traffic, run_virtually
from tests.gpu_proof.mutant import mutant

# bf16 and tf32.


@triton.jit
def _cast_kernel(x_ptr, y_ptr):
    e = tl.arange(0, 256)
    tl.store(y_ptr + e, tl.load(x_ptr + e).to(tl.bfloat16))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr):
    e = tl.arange(0, 256)
    x = tl.load(x_ptr + e).to(tl.bfloat16)
    tl.store(y_ptr + e, tl.where(x * x > x, x + x, x - 3 * x))


@triton.jit
def _from_int_kernel(x_ptr, y_ptr):
    e = tl.arange(0, 256)
    tl.store(y_ptr + e, (e * 3).to(tl.bfloat16))


@triton.jit
def _dot_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i[:, None] * 16 + i[None, :]).to(tl.bfloat16)
    tl.store(y_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, x))


@triton.jit
def _tf32_dot_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i[:, None] * 16 + i[None, :])
    tl.store(y_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, x, input_precision="tf32"))


def _arithmetic(x: Tensor) -> Tensor:
    x = x.bfloat16()
    return torch.where(x * x > x, x + x, x - 3 * x)


def _dot(x: Tensor) -> Tensor:
    x = x.bfloat16().float().view(16, 16)
    return (x @ x).view(-1)


def _tf32_dot(x: Tensor) -> Tensor:
    x = (x.view(torch.int32) & ~0x1FFF).view(torch.float32).view(16, 16)
    return (x @ x).view(-1)


@pytest.mark.parametrize(
    ("kernel", "expected", "dtype"),
    [
        (_cast_kernel, lambda x: x.bfloat16(), torch.bfloat16),
        (_arithmetic_kernel, _arithmetic, torch.bfloat16),
        (_from_int_kernel, lambda x: (torch.arange(256) * 3).bfloat16(), torch.bfloat16),
        (_dot_kernel, _dot, torch.float32),
        (_tf32_dot_kernel, _tf32_dot, torch.float32),
    ],
    ids=["cast", "arithmetic", "from int", "dot", "tf32 dot"],
)
def test_patch_is_needed_and_right(kernel: object, expected: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(256)
    x[:4] = torch.tensor([torch.inf, -torch.inf, 1e-40, 3.3961e38]) if kernel is _cast_kernel else 1.0

    def run() -> Tensor:
        y = torch.full((256,), torch.nan, dtype=dtype)
        launch(kernel, (1,), x, y)
        return y

    torch.testing.assert_close(run(), expected(x), rtol=1e-5 if dtype == torch.float32 else 0, atol=0)
    with interpreter.uninstalled():
        assert not torch.allclose(run().float(), expected(x).float(), rtol=1e-5), "Triton is right: drop this patch"


# Kernels broken on purpose.


@triton.jit
def _sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, EXTRA: tl.constexpr, TWICE: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < n + EXTRA
    x = tl.load(x_ptr + e, mask=mask, other=0.0)
    if TWICE:
        x = (x + tl.load(x_ptr + e, mask=mask, other=0.0)) / 2
    tl.store(y_ptr + e, x, mask=e < n)


def copy(x: Tensor, *, extra: int = 0, twice: bool = False) -> Tensor:
    y = torch.full_like(x, torch.nan)
    launch(
        _sum_kernel, (triton.cdiv(x.numel(), 64),), x, y, x.numel(), BLOCK=64, EXTRA=extra, TWICE=twice
    )  # fmt: skip
    return y


def test_wrong_mask_at_a_ragged_edge() -> None:
    x = torch.randn(1000)
    assert torch.equal(copy(x), x)
    with pytest.raises(OutOfBounds, match=r"_sum_kernel, program \(15, 0, 0\): load of 1 lane.*past the end of x_ptr"):
        copy(x, extra=1)


def test_reading_twice_shows_in_the_traffic() -> None:
    x = torch.randn(1000)
    with count_traffic() as t:
        copy(x)
    assert (t.launches, t.loaded, t.stored) == (1, x.nbytes, x.nbytes)
    with count_traffic() as t:
        copy(x, twice=True)
    assert t.kernels["_sum_kernel"].loaded == 2 * x.nbytes


@triton.jit
def _atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr + tl.arange(0, 16), 1.0)


def test_atomics_are_refused() -> None:
    with pytest.raises(AtomicUsed, match="_atomic_kernel"):
        launch(_atomic_kernel, (1,), torch.zeros(16))


def test_int32_overflow() -> None:
    x = torch.empty(2**31 + 64, dtype=torch.float32, device="meta")
    with record_launches(run=False) as recorder:
        copy(x)
    run_virtually(recorder.launches[0], [(0, 0, 0), (2**25 - 1, 0, 0)])
    with pytest.raises(OutOfBounds):
        run_virtually(recorder.launches[0])


# The codec's own kernels, one line changed.


def test_codec_with_swapped_nibbles(tmp_path: Path) -> None:
    q = quantize_nf4(torch.randn(100))
    broken = mutant(triton_impl, tmp_path, ("tl.join(even * scale[:, None], odd", "tl.join(odd * scale[:, None], even"))
    assert torch.equal(triton_impl.dequantize_nf4(q, torch.float32), dequantize_nf4(q, torch.float32))
    assert not torch.equal(broken.dequantize_nf4(q, torch.float32), dequantize_nf4(q, torch.float32))


@pytest.mark.parametrize(
    "change",
    [
        ("tl.reshape(value, [TILE // ROW, ROW]), left)", "tl.reshape(value, [TILE // ROW, ROW]), left + 1)"),
        ("tl.max_contiguous(byte, [1, 4]), (left + 1) // 2)", "tl.max_contiguous(byte, [1, 4]), left // 2 + 1)"),
        ("inside = row * ROW < left", "inside = row * ROW <= left"),
    ],
    ids=["store", "load", "absmax"],
)
def test_codec_with_a_wrong_mask(tmp_path: Path, change: tuple[str, str]) -> None:
    q = quantize_nf4(torch.randn(64 * 50))
    with pytest.raises(OutOfBounds, match="_dequantize_nf4_kernel"):
        mutant(triton_impl, tmp_path, change).dequantize_nf4(q, torch.float32)


def test_codec_that_drops_the_last_element(tmp_path: Path) -> None:
    q = quantize_nf4(torch.randn(99))
    change = ("tl.reshape(value, [TILE // ROW, ROW]), left)", "tl.reshape(value, [TILE // ROW, ROW]), left - 1)")
    out = torch.full((99,), torch.nan)
    mutant(triton_impl, tmp_path, change).dequantize_nf4_out(q, out)
    assert out[98].isnan()  # nothing but a NaN-filled output shows it


def test_codec_that_reads_twice(tmp_path: Path) -> None:
    q = quantize_nf4(torch.randn(1 << 14))
    again = "load_ragged(packed_ptr + start // 2, byte, (left + 1) // 2)"
    broken = mutant(triton_impl, tmp_path, ("decode_nf4(packed)", f"decode_nf4(packed | {again})"))
    with count_traffic() as t:
        out = broken.dequantize_nf4(q, torch.bfloat16)
    assert t.total > 1.05 * (q.nbytes + out.nbytes)


def test_codec_with_int32_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutant(triton_impl, tmp_path, ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"))
    caught = 0
    monkeypatch.setattr(nf4_codec, "triton_impl", broken)
    for case in nf4_codec.cases():
        if case.huge:
            with record_launches(run=False) as recorder:
                case.call()
            with pytest.raises(OutOfBounds):
                run_virtually(recorder.launches[0])
            caught += 1
    assert caught > 0
