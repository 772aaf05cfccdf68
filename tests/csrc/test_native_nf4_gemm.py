"""Products with an NF4 weight in C++, through the C ABI: every instruction set, shape, stride and dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ops.functional import dequantize_nf4, quantize_nf4
from lora_ops.quant import native_abi
from lora_ops.quant.native_abi import WeightView, nf4_view
from lora_ops.quant.nf4 import BLOCK_SIZES, NF4Tensor
from lora_ops.quant.nf4 import native_abi as nf4_abi
from lora_ops.quant.nf4.codec.reference import absmax_of
from lora_ops.quant.nf4.native_abi import weight_of
from lora_ops.runtime import native
from tests.cases import LinearCase, LinearInputs, assert_right

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 7.0


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def displaced(t: Tensor, gap: int, offset: int) -> Tensor:
    """The same matrix with NaN between its rows, at an address that is `offset` elements from an aligned one."""
    rows, columns = t.shape
    buffer = torch.full((offset + rows * (columns + gap),), torch.nan, dtype=t.dtype)
    view = buffer[offset:].view(rows, columns + gap)[:, :columns]
    view.copy_(t)
    return view


def guarded(rows: int, columns: int, gap: int, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output among guards, and the whole buffer."""
    buffer = torch.full((offset + (rows + 1) * (columns + gap),), GUARD, dtype=dtype)
    view = buffer[offset : offset + rows * (columns + gap)].view(rows, columns + gap)[:, :columns]
    view.fill_(torch.nan)
    return view, buffer


def product(
    x: Tensor, q: NF4Tensor, bias: Tensor | None = None, *, dx: bool = False, gap: int = 0, offset: int = 0
) -> Tensor:
    out, buffer = guarded(x.shape[0], q.shape[1] if dx else q.shape[0], gap, offset, x.dtype)
    if dx:
        native_abi.linear_dx(nf4_view(q), x, out)
    else:
        native_abi.linear(nf4_view(q), x, bias, out)
    written = torch.zeros_like(buffer, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    assert (buffer[~written] == GUARD).all()
    return out


def results(i: LinearInputs, gap: int = 0, offset: int = 0) -> dict[str, Tensor]:
    got = {
        "y": product(displaced(i.x, gap, offset), i.nf4, i.bias, gap=gap, offset=offset),
        "dx": product(displaced(i.dy, gap, offset), i.nf4, dx=True, gap=gap, offset=offset),
    }
    if i.bias is not None:
        got["dbias"] = i.dy.sum(0, dtype=i.bias.dtype)
    return got


cases = st.builds(
    LinearCase,
    m=st.one_of(st.integers(1, 9), st.integers(1, 60)),
    n=st.one_of(st.integers(1, 5), st.integers(1, 150)),
    # Multiples of 64 take the aligned kernels; beyond 1024 a sum of fp32 engines spans two panels.
    k=st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 320, 1024, 1025, 1088, 2100, 2240])),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    bias=st.booleans(),
    ill_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(cases, st.integers(0, 5), st.integers(0, 33))
@settings(deadline=None, max_examples=60)
def test_any_shape(isa: str, case: LinearCase, gap: int, offset: int) -> None:
    inputs = case.inputs()
    assert_right(inputs, results(inputs, gap, offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 4224, 128),  # bfloat16: dX's sums span two panels
        (4, 65, 4224),
        (17, 130, 4225),  # bfloat16: y's sums span two panels, ragged
        (2100, 33, 65),  # more rows than a task takes
    ],
)
def test_sums_and_rows_beyond_a_panel(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    inputs = LinearCase(m, n, k, dtype=dtype, bias=True, double_quant=True).inputs()
    assert_right(inputs, results(inputs))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128, 256, 4096])
@pytest.mark.parametrize("m", [3, 8, 20, 30])
def test_blocks_that_end_within_rows(isa: str, m: int, block_size: int, double_quant: bool) -> None:
    """Rows of 5 times 64: the kernels for aligned rows count the blocks that they meet along rows and down columns."""
    inputs = LinearCase(m, 128, 320, dtype=torch.bfloat16, block_size=block_size, double_quant=double_quant).inputs()
    assert_right(inputs, results(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 300, 512), (3, 301, 513), (8, 256, 256), (19, 300, 256), (70, 128, 320), (300, 65, 1100)]
)
def test_threads_and_repetition_do_not_change_bits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    inputs = LinearCase(m, n, k, dtype=dtype, bias=True).inputs()
    expected = results(inputs)
    for count in (1, 2, 3, 1):
        with threads(count):
            for name, t in results(inputs).items():
                assert torch.equal(t, expected[name])


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 30])
@pytest.mark.parametrize("k", [128, 130])
def test_rows_are_independent(isa: str, m: int, k: int) -> None:
    """inf and NaN stay in their row, and a row of zeros gives the bias, whatever its neighbours hold."""
    q = quantize_nf4(torch.ones(66, k))
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    bias = torch.randn(66).bfloat16()
    x[m // 2, k - 1] = torch.inf
    y = product(x, q, bias)
    assert (y[m // 2] == torch.inf).all()
    x[m // 2, 0] = torch.nan
    y = product(x, q, bias)
    assert y[m // 2].isnan().all()
    others = [i for i in range(m) if i != m // 2]
    assert torch.equal(y[others], bias.expand(m - 1, 66))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dx", [False, True])
def test_infinite_weights_stay_in_their_block(isa: str, dtype: torch.dtype, dx: bool) -> None:
    """As in dense torch: a block of inf reaches the outputs that it is a term of, and no other."""
    for n, k, m in ((70, 96, 3), (70, 128, 3), (70, 96, 20), (128, 128, 20)):
        q = quantize_nf4(torch.randn(n, k))
        q.absmax[5] = torch.inf
        x = torch.ones(m, n if dx else k, dtype=dtype)
        w = dequantize_nf4(q, dtype=torch.float32)
        expected = x.float() @ (w if dx else w.T)
        assert torch.equal(product(x, q, dx=dx).isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(isa: str, dtype: torch.dtype) -> None:
    def empty(n: int, k: int) -> NF4Tensor:
        return quantize_nf4(torch.randn(n, k))

    assert product(torch.ones(0, 64, dtype=dtype), empty(8, 64)).shape == (0, 8)
    assert product(torch.ones(3, 64, dtype=dtype), empty(0, 64)).shape == (3, 0)
    bias = torch.randn(8).to(dtype)
    for m in (1, 3, 12):
        assert torch.equal(product(torch.ones(m, 0, dtype=dtype), empty(8, 0), bias), bias.expand(m, 8))
        zeros = product(torch.ones(m, 0, dtype=dtype), empty(0, 64), dx=True)
        assert torch.equal(zeros, torch.zeros(m, 64, dtype=dtype))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_products_equal_dense_ones_of_integers(isa: str, block_size: int) -> None:
    """Weights of -1, 0 and 1 and small integers in x: every sum is exact, so every path gives the same bits."""
    for m, n, k in (
        (1, 64, 64), (4, 67, 192), (8, 130, 320), (9, 64, 64), (33, 65, 321), (7, 128, 4352),
        (2, 67, 128), (3, 65, 64), (5, 3, 128), (11, 66, 4352), (17, 131, 128), (24, 1, 192), (25, 66, 128),
    ):  # fmt: skip
        w = torch.randint(-1, 2, (n, k)).float()
        w.view(-1)[::block_size] = 1
        bias = torch.randint(-9, 10, (n,)).float()
        q = quantize_nf4(w, block_size=block_size)
        for dtype in DTYPES:
            x, dy = torch.randint(-3, 4, (m, k)).to(dtype), torch.randint(-3, 4, (m, n)).to(dtype)
            assert torch.equal(product(x, q, bias.to(dtype)), (x.float() @ w.T + bias).to(dtype))
            assert torch.equal(product(dy, q, dx=True), (dy.float() @ w).to(dtype))


def test_bad_arguments_are_refused() -> None:
    q = quantize_nf4(torch.randn(4, 64))
    lib, w = native.library(), WeightView(nf4=weight_of(q))
    x, y = torch.zeros(3, 64), torch.zeros(3, 4)
    bad = 1

    def call(n: int = 4, k: int = 64, m: int = 3, stride_y: int = 4, dtype: int = 0, n_threads: int = 1) -> int:
        return lib.lora_ops_linear(w, n, k, x.data_ptr(), m, 64, None, y.data_ptr(), stride_y, dtype, n_threads)

    assert call() == 0
    assert call(n=-1) == call(m=-1) == call(k=-1) == bad
    assert call(stride_y=3) == call(dtype=7) == call(n_threads=0) == bad
    w.nf4.block_size = 33
    assert call() == bad


@pytest.mark.parametrize("m", [1, 4, 8, 20])
def test_blocks_may_straddle_tasks(m: int) -> None:
    """The C ABI takes any multiple of 32; a task, 64 rows of W, then begins within a block."""
    n, k, block_size = 150, 320, 192
    w = torch.randn(n, k)
    packed = torch.empty(n * k // 2, dtype=torch.uint8)
    absmax = torch.empty(n * k // block_size)
    nf4_abi.quantize(w, block_size, packed, absmax)
    weight = nf4_abi.NF4Weight(packed.data_ptr(), absmax.data_ptr(), block_size=block_size)
    dense = torch.empty(n, k)
    nf4_abi.dequantize(weight, 0, n * k, dense)

    columns = torch.linspace(0, k - 1, m).long()
    x, y = 3 * torch.eye(k, dtype=torch.bfloat16)[columns], torch.empty(m, n, dtype=torch.bfloat16)
    native_abi.linear(WeightView(nf4=weight), x, None, y)
    assert torch.equal(y, 3 * dense.bfloat16()[:, columns].T)


@pytest.mark.parametrize("m", [1, 4, 8, 20, 60])
@pytest.mark.parametrize(("k", "block_size"), [(2240, 64), (704, 128), (300, 64)])
@pytest.mark.parametrize("isa", native.supported_isas())
def test_double_quantized_scales_to_the_last_bit(isa: str, k: int, block_size: int, m: int) -> None:
    """Looked up in whatever way, they are those of the reference: sums in bfloat16 would hide an error of 1 / 256."""
    q = quantize_nf4(torch.randn(150, k) * torch.rand(150, 1), block_size=block_size, double_quant=True)
    single = replace(q, absmax=absmax_of(q), nested_absmax=None, nested_offset=None)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, 150).bfloat16()
    with native.force_isa(isa):
        assert torch.equal(product(x, q), product(x, single))
        assert torch.equal(product(dy, q, dx=True), product(dy, single, dx=True))


@pytest.mark.parametrize("m", [1, 4, 8, 20, 60])
@pytest.mark.parametrize("k", [2240, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", native.supported_isas())
def test_a_single_term_is_that_of_the_rounded_weight(isa: str, dtype: torch.dtype, k: int, m: int) -> None:
    """Three times the weight, not the weight: its last rounding would hide that there was none before."""
    q = quantize_nf4(torch.randn(150, k))
    w = dequantize_nf4(q, dtype=dtype)
    with native.force_isa(isa):
        columns, rows = torch.randperm(k)[:m], torch.randperm(150)[:m]
        x, dy = 3 * torch.eye(k, dtype=dtype)[columns], 3 * torch.eye(150, dtype=dtype)[rows]
        assert torch.equal(product(x, q), 3 * w[:, columns].T)
        assert torch.equal(product(dy, q, dx=True), 3 * w[rows])
