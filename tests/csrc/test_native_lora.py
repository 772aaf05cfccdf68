"""The low-rank part of lora_linear in C++: masks bit for bit, products against float64, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lora_ops
from lora_ops.functional import dequantize_nf4, lora_linear, quantize_nf4
from lora_ops.kernels.lora_linear import native_abi
from lora_ops.kernels.philox import dropout_mask, keep_scale, threshold
from lora_ops.quant import native_abi as weight_abi
from lora_ops.runtime import native
from tests.cases import LinearCase, assert_right, run_ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 2**62 + 12345
GUARD = 48.0  # an exact value in every dtype, around what may be written


@given(
    first=st.integers(0, 2**31),
    n_rows=st.integers(0, 9),
    k=st.integers(1, 600),
    p=st.sampled_from([0.0, 1e-5, 0.05, 0.5, 1 - 1e-5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 2**31),
)
def test_masks_are_the_references(isa: str, first: int, n_rows: int, k: int, p: float, seed: int, offset: int) -> None:
    rows = slice(first, first + n_rows)
    bits = torch.full((n_rows, -(-k // 8)), 0xA5, dtype=torch.uint8)
    native_abi.dropout_mask(rows, k, threshold(p), seed, offset, bits)
    got = np.unpackbits(bits.numpy(), axis=1, bitorder="little")[:, :k].astype(bool)
    assert np.array_equal(got, dropout_mask(rows, k, p, torch.tensor(seed), offset).numpy())


def guarded(t: Tensor) -> Tensor:
    """The same values as rows of a wider tensor whose other elements are GUARD, at an odd offset."""
    wide = t.new_full((t.shape[0] + 2, t.shape[1] + 7), GUARD)
    view = wide[1:-1, 3:-4]
    view.copy_(t)
    return view


def assert_guards(view: Tensor) -> None:
    base = view._base
    assert base is not None
    base[1:-1, 3:-4] = GUARD
    assert (base == GUARD).all()


def error(got: Tensor, truth: Tensor, magnitude: Tensor) -> float:
    """The largest error, in units of the root of the sum of the squares of the terms, beyond the step of subnormals."""
    finfo = torch.finfo(got.dtype)
    beyond = ((got.double() - truth).abs() - finfo.smallest_normal * finfo.eps).clamp_min(0.0)
    return float((beyond / magnitude.clamp_min(1e-30)).max()) if got.numel() else 0.0


@dataclass
class Operands:
    """Operands of one call through the C ABI, and what comes out by the formulas in float64."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    weight: str | None = None  # "dense", "transposed" (dense) or "nf4": with the products with W, and y has a bias

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.m + 3 * self.n + 7 * self.k + self.r)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.x, self.dy = randn(self.m, self.k).to(self.dtype), randn(self.m, self.n).to(self.dtype)
        self.y, self.dx = randn(self.m, self.n).to(self.dtype), randn(self.m, self.k).to(self.dtype)
        self.a = (randn(self.r, self.k) / self.k**0.5).to(self.adapter_dtype)
        self.b = (randn(self.n, self.r) / self.r**0.5).to(self.adapter_dtype)
        self.scale = 1.5
        self.w, self.bias = (randn(self.n, self.k) / self.k**0.5).to(self.dtype), randn(self.n).to(self.dtype)
        self.q = quantize_nf4(self.w)
        if self.weight == "nf4":
            self.w = dequantize_nf4(self.q)

    def run(self) -> dict[str, Tensor]:
        """Every result, from guarded inputs and outputs."""
        low_rank = native_abi.adapter_view(self.a, self.b, self.scale, threshold(self.p), SEED)
        x, dy, y, dx = (guarded(t) for t in (self.x, self.dy, self.y, self.dx))
        s = torch.full((self.m, self.r), torch.nan)
        weight, bias = None, None
        if self.weight:  # outputs are written, not added to
            y[:], dx[:], bias = torch.nan, torch.nan, self.bias
            w = guarded(self.w.T).T if self.weight == "transposed" else guarded(self.w)
            weight = weight_abi.nf4_view(self.q) if self.weight == "nf4" else weight_abi.dense_view(w)
        native_abi.forward(low_rank, x, s, y, weight, bias)
        da, db = torch.full_like(self.a, torch.nan), torch.full_like(self.b, torch.nan)
        dbias = torch.full((self.n,), torch.nan, dtype=self.dtype)
        native_abi.backward(low_rank, dy, x, s, weight, dx=dx, dlora_a=da, dlora_b=db, dbias=dbias)
        results = {"s": s, "y": y.clone(), "dx": dx.clone(), "da": da, "db": db, "dbias": dbias}
        for view, before in ((x, self.x), (dy, self.dy)):
            assert torch.equal(view.nan_to_num(), before.nan_to_num())
        for view in (x, dy, y, dx):
            assert_guards(view)
        return results

    def check(self, results: dict[str, Tensor]) -> None:
        """Within a few roundings of float64; the tolerance rule itself is kept by the tests through tests.cases."""
        squares = {name: t.double().square() for name, t in vars(self).items() if isinstance(t, Tensor)}
        exact = {name: t.double() for name, t in vars(self).items() if isinstance(t, Tensor)}
        mask = torch.ones(self.m, self.k, dtype=torch.float64)
        if self.p:
            mask = dropout_mask(slice(0, self.m), self.k, self.p, torch.tensor(SEED)) * keep_scale(self.p)
        if self.weight:
            for t in (exact, squares):
                t["y"], t["dx"] = t["x"] @ t["w"].T + t["bias"], t["dy"] @ t["w"]
        truth = self._formulas(exact, mask, self.scale)
        magnitude = self._formulas(squares, mask**2, self.scale**2)
        u = torch.finfo(self.dtype).eps / 2
        u_adapter = torch.finfo(self.adapter_dtype).eps / 2
        assert set(results) == set(truth)
        for name, got in results.items():
            own = u_adapter if name in ("da", "db") else 2.0**-24 if name == "s" else u
            limit = 4 * (u if name != "s" else 2.0**-9 if self.dtype == torch.bfloat16 else 0.0) + 2 * own + 2.0**-20
            assert got.isfinite().all(), name
            assert error(got, truth[name], magnitude[name].sqrt()) <= 2 * limit, name

    @staticmethod
    def _formulas(t: dict[str, Tensor], mask: Tensor, scale: float) -> dict[str, Tensor]:
        dropped = t["x"] * mask
        s, ds = dropped @ t["a"].T, scale * (t["dy"] @ t["b"])
        return {
            "s": s,
            "y": t["y"] + scale * (s @ t["b"].T),
            "dx": t["dx"] + (ds @ t["a"]) * mask,
            "da": ds.T @ dropped,
            "db": scale * (t["dy"].T @ s),
            "dbias": t["dy"].sum(0),
        }


@given(
    m=st.integers(0, 80),
    n=st.integers(1, 300),
    k=st.integers(1, 600),
    r=st.one_of(st.integers(1, 20), st.integers(21, 130)),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=40)
def test_against_float64(
    isa: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> None:
    operands = Operands(m, n, k, r, dtype, adapter_dtype, p)
    operands.check(operands.run())


@given(
    m=st.one_of(st.integers(0, 20), st.integers(21, 150)),
    n=st.integers(1, 300),
    k=st.integers(1, 600),
    r=st.one_of(st.integers(1, 20), st.integers(21, 130)),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    weight=st.sampled_from(["dense", "transposed", "nf4"]),
)
@example(m=5, n=1, k=497, r=1, dtype=torch.float16, adapter_dtype=torch.float32, p=0.3, weight="dense")  # subnormal dx
@settings(max_examples=40)
def test_products_with_the_weight(
    isa: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    p: float,
    weight: str,
) -> None:
    """Of bfloat16 the low-rank term is added to the sums of the product: rounded once."""
    operands = Operands(m, n, k, r, dtype, adapter_dtype, p, weight)
    operands.check(operands.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", "transposed", "nf4"])
@pytest.mark.parametrize("m", [1, 4, 6, 8, 9, 16, 24, 33])
def test_few_rows_with_the_weight(isa: str, m: int, weight: str, dtype: torch.dtype) -> None:
    """Ranks of several vectors, and rows whose scales are looked up in several pieces, by each kernel for few rows."""
    operands = Operands(m, 9, 4224, 70, dtype, torch.float32, 0.1, weight)
    operands.check(operands.run())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights_are_multiplied_where_torch_is_slow(isa: str, dtype: torch.dtype, transposed: bool) -> None:
    """By the op, too: not one product with W is left to torch."""
    features = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = {torch.float32: "", torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}[dtype] in features.split()
    w = torch.randn(32, 48).to(dtype).T if transposed else torch.randn(48, 32).to(dtype)
    # How fast torch is on ARM is not known.
    taken = isa not in ("portable", "neon", "neon_bf16") and not fast
    assert weight_abi.takes_dense(w) == taken
    assert not weight_abi.takes_dense(torch.randn(48, 64).to(dtype)[:, ::2]), (
        "neither rows nor columns follow each other"
    )
    x, a, b = torch.randn(5, 32).to(dtype).requires_grad_(), torch.randn(4, 32), torch.randn(48, 4)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, lora_ops.use_backend("native"):
        lora_linear(x, w, a, b, scale=1.0).sum().backward()
    by_torch = {event.key for event in profiler.key_averages()} & {"aten::linear", "aten::mm", "aten::matmul"}
    assert bool(by_torch) != taken, by_torch


def test_the_sum_of_both_products_is_rounded_once() -> None:
    """The low-rank term takes away the product itself, rounded: what is left is what rounding that first would lose."""
    if native.isa() != "avx512_bf16":
        pytest.skip("the sums of other instruction sets are rounded before; run on a machine with AVX-512 BF16")
    x, w = torch.randn(30, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    y, s, b = torch.full((30, 2), torch.nan, dtype=torch.bfloat16), torch.empty(30, 2), -0.5 * torch.eye(2)
    native_abi.forward(native_abi.adapter_view(w, b, 2.0), x, s, y, weight_abi.dense_view(w))
    assert torch.allclose(y.float(), s - s.bfloat16().float(), rtol=0.02, atol=1e-4)
    assert y.abs().max() > 4e-3


@pytest.mark.parametrize("r", [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 128, 129, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(isa: str, dtype: torch.dtype, r: int) -> None:
    operands = Operands(33, 65, 129, r, dtype, torch.float32, 0.1)
    operands.check(operands.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_columns(isa: str, dtype: torch.dtype) -> None:
    """Several super-rows of the backward, and groups of several tiles."""
    operands = Operands(600, 2500, 300, 5, dtype, torch.float32, 0.1)
    operands.check(operands.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 4096, 1000, 16), (600, 1300, 300, 5), (70, 257, 600, 64)])
@pytest.mark.parametrize("weight", [None, "dense", "transposed", "nf4"])
def test_any_thread_count_gives_the_same_bits(
    isa: str, weight: str | None, dtype: torch.dtype, m: int, n: int, k: int, r: int
) -> None:
    operands = Operands(m, n, k, r, dtype, torch.float32, 0.1, weight)
    results = []
    for threads in (1, 2, 3, 2):
        # Not torch.set_num_threads: torch itself then keeps its pool.
        with mock.patch.object(torch, "get_num_threads", lambda threads=threads: threads):
            results.append(operands.run())
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("wanted", ["dx", "dlora_a", "dlora_b", "dbias"])
def test_each_gradient_alone(isa: str, wanted: str) -> None:
    """The same bits as together with the others, with the operands that it does not need left out."""
    o = Operands(300, 270, 300, 10, torch.bfloat16, torch.float32, 0.1)
    s = torch.randn(o.m, o.r)

    def outputs() -> dict[str, Tensor]:
        empty = {"dlora_a": torch.empty_like(o.a), "dlora_b": torch.empty_like(o.b), "dbias": o.dy.new_empty(o.n)}
        return {"dx": o.dx.clone(), **empty}

    low_rank = native_abi.adapter_view(o.a, o.b, o.scale, threshold(o.p), SEED)
    together, alone = outputs(), outputs()[wanted]
    native_abi.backward(low_rank, o.dy, o.x, s, **together)
    x, needed_s = o.x if wanted == "dlora_a" else None, s if wanted == "dlora_b" else None
    native_abi.backward(low_rank, o.dy, x, needed_s, **{wanted: alone})
    assert torch.equal(alone, together[wanted])


def test_dropped_elements_are_not_read_into_sums(isa: str) -> None:
    """inf and NaN where the mask drops leave the results finite, as torch.where does."""
    o = Operands(40, 30, 300, 4, torch.bfloat16, torch.float32, 0.5)
    kept = dropout_mask(slice(0, o.m), o.k, o.p, torch.tensor(SEED))
    o.x = torch.where(kept, o.x, torch.tensor([torch.inf, torch.nan]).repeat(o.k // 2).bfloat16())
    results = o.run()
    assert results["s"].isfinite().all()
    assert results["da"].isfinite().all()


def test_bad_arguments_are_refused() -> None:
    o = Operands(4, 5, 6, 2, torch.float32, torch.float32, 0.0)
    s = torch.empty(4, 2)
    bad = native_abi.adapter_view(o.a, o.b, 1.0, threshold=65537)
    with pytest.raises(native.NativeError, match="lora_forward: refused its arguments"):
        native_abi.forward(bad, o.x, s, o.y)
    good = native_abi.adapter_view(o.a, o.b, 1.0)
    with pytest.raises(native.NativeError, match="lora_backward: refused its arguments"):
        native_abi.backward(good, o.dy, None, s, dlora_a=torch.empty_like(o.a))
    with pytest.raises(native.NativeError, match="dropout_mask: refused its arguments"):
        native_abi.dropout_mask(slice(-1, 1), 8, 5, 0, 0, torch.empty(2, 1, dtype=torch.uint8))


cases = st.builds(
    LinearCase,
    m=st.integers(0, 100),
    n=st.integers(1, 300),
    k=st.integers(1, 600),
    r=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, torch.float32]),
    weight=st.sampled_from(["dense", "transposed", "nf4"]),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.05, 1.0]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    zero_b=st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(case=cases)
@settings(max_examples=20)
def test_the_op_keeps_the_tolerance_rule(isa: str, case: LinearCase) -> None:
    inputs = case.inputs()
    with lora_ops.use_backend("native"):
        assert_right(inputs, run_ours(inputs))
