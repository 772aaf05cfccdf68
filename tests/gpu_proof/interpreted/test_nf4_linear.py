"""nf4_linear's kernels against float64 on all routes: both directions, every dtype, blocks that cross rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ops
from lora_ops.functional import nf4_linear, quantize_nf4
from lora_ops.quant.frozen import operands
from lora_ops.quant.nf4 import BLOCK_SIZES, NF4_CODE, NF4Tensor
from lora_ops.quant.nf4.linear import triton_impl
from lora_ops.runtime.crossovers import force
from lora_ops.runtime.triton_launch import pretend_capability, record_launches
from tests.cases import LinearCase, assert_right, in_wider_rows, run_ours
from tests.gpu_proof.interpreter import count_traffic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

cases = st.builds(
    LinearCase,
    m=st.one_of(st.integers(0, 5), st.integers(0, 70)),
    n=st.integers(1, 100),
    k=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 256, 512, 1024])),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    bias=st.booleans(),
    batch=st.sampled_from([(), (), (2,)]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.fixture(autouse=True)
def _nan_filled() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=40)
@given(case=cases)
def test_drawn(case: LinearCase) -> None:
    inputs = case.inputs()
    assert_right(inputs, run_ours(inputs))


@settings(max_examples=15)
@given(case=cases)
def test_large_m_route(case: LinearCase) -> None:
    inputs = case.inputs()
    with force(nf4_gemv_max_m=0, nf4_gemm_max_m=-1):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize(("m", "gemm"), [(1, 0), (16, 1), (32, 1), (33, 0), (150, 0)])
@pytest.mark.parametrize("k", [192, 200])
def test_on_fma_units(m: int, gemm: int, k: int) -> None:
    """float16 as on a T4: few tokens in the GEMM that decodes, in the tiles of float32, the others by cuBLAS."""
    inputs = LinearCase(m=m, n=70, k=k, dtype=torch.float16, double_quant=True, bias=True).inputs()
    with pretend_capability((7, 5)), record_launches() as recorder:
        assert_right(inputs, run_ours(inputs))
    tiles = [call.meta["BLOCK_J"] for call in recorder.launches if call.kernel.__name__ == "_nf4_gemm_kernel"]
    assert tiles == [32] * (2 * gemm if m > 1 else 1 + (k == 200))  # y and dX; y of one token is the GEMV's


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 2048), (3, 100, 1088), (16, 70, 2048), (150, 70, 192)])
def test_several_blocks(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Sizes that split the sums; M beyond a tile."""
    inputs = LinearCase(m=m, n=n, k=k, dtype=dtype, double_quant=True, bias=True).inputs()
    with force(nf4_gemm_max_m=2**31):
        assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize(("m", "k"), [(3, 128), (20, 128), (20, 97)])
def test_rows_with_gaps(m: int, k: int) -> None:
    """Columns of a wider x and dY are read where they lie, without a copy."""
    inputs = in_wider_rows(LinearCase(m=m, n=70, k=k, dtype=torch.bfloat16).inputs())
    assert triton_impl.as_rows(inputs.x).data_ptr() == inputs.x.data_ptr()
    assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("k", [128, 97])
def test_every_code_in_both_nibbles(m: int, k: int) -> None:
    """With x = rows of the identity, y is W itself: each weight is the code book's value times its absmax, rounded."""
    codes = torch.arange(16 * k) * 7 % 16
    pairs = codes.view(-1, 2)
    absmax = torch.exp2(torch.arange(-(-16 * k // 64)) % 5 - 2.0)
    q = NF4Tensor((pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None], absmax, (16, k), torch.float32)
    w = (torch.tensor(NF4_CODE)[codes] * absmax.repeat_interleave(64)[: 16 * k]).view(16, k)
    rows = torch.eye(k)
    y = torch.cat([nf4_linear(rows[i : i + m], q) for i in range(0, k, m)])
    assert torch.equal(y.T, w)
    assert torch.equal(torch.ops.lora_ops.nf4_linear_dx(torch.eye(16), *operands(q)), w)


@pytest.mark.parametrize(("m", "kernel"), [(1, "_nf4_gemv_kernel"), (4, "_nf4_gemv_kernel"), (5, "_nf4_gemm_kernel"),
                                           (256, "_nf4_gemm_kernel"), (257, "_dequantize_nf4_kernel")])  # fmt: skip
def test_routes(m: int, kernel: str) -> None:
    q = quantize_nf4(torch.randn(32, 64))
    with record_launches() as recorder:
        nf4_linear(torch.randn(m, 64), q)
    assert recorder.launches[0].kernel.__name__ == kernel


def test_add_to() -> None:
    q = quantize_nf4(torch.randn(70, 128), double_quant=True)
    for m in (3, 20):
        x, add = torch.randn(m, 128), torch.randn(m, 70)
        expected = nf4_linear(x, q) + add
        torch.testing.assert_close(triton_impl.matmul(x, q, transposed=True, add_to=add.clone()), expected)
        with force(nf4_gemv_max_m=0, nf4_gemm_max_m=0):
            torch.testing.assert_close(triton_impl.matmul(x, q, transposed=True, add_to=add.clone()), expected)


def test_bitwise_repeatable() -> None:
    inputs = LinearCase(m=20, n=100, k=512, dtype=torch.bfloat16).inputs()
    first, second = run_ours(inputs), run_ours(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("m", [1, 4, 16])
def test_packed_bytes_are_read_once(m: int, double_quant: bool) -> None:
    """Codes and scales once; beside them x, which a block of rows of W reads anew, from L2."""
    n, k = 64, 1024
    i = LinearCase(m=m, n=n, k=k, dtype=torch.bfloat16, double_quant=double_quant).inputs()
    with count_traffic() as t:
        nf4_linear(i.x, i.nf4)
    kernel = t.kernels["_nf4_gemv_kernel" if m <= 4 else "_nf4_gemm_kernel"]
    rereads = n // (8 if m <= 4 else 64)
    # Double-quantized, each scale brings the fp32 scale and the offset of its group along, from L1.
    scales = i.nf4.absmax.numel() * (4 if not double_quant else 1 + 4 + 4)
    table = 0 if not double_quant else 256 * 4
    assert kernel.loaded <= 1.05 * (i.nf4.packed.nbytes + scales + table + rereads * i.x.nbytes), t


def test_declines_float64() -> None:
    with pytest.raises(lora_ops.BackendError, match="triton kernels have no float64"):
        run_ours(LinearCase(m=2, n=4, k=64, dtype=torch.float64).inputs())
