"""frozen_linear on every backend against float64: dense weights of every layout, gradients, autocast, compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import lora_ops
from lora_ops.functional import frozen_linear, nf4_linear, quantize_nf4
from lora_ops.quant import native_abi
from lora_ops.quant.frozen import operands
from tests.cases import LinearCase, LinearInputs, assert_right, backends_here, in_wider_rows, run_ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

cases = st.builds(
    LinearCase,
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    weight=st.sampled_from(["dense", "transposed"]),
    bias=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)


def dense(i: LinearInputs) -> torch.Tensor:
    assert isinstance(i.weight, torch.Tensor)
    return i.weight


@pytest.mark.parametrize("backend", backends_here())
class TestAgainstFloat64:
    @given(case=cases, wider=st.booleans())
    def test_drawn(self, backend: str, case: LinearCase, wider: bool) -> None:
        inputs = in_wider_rows(case.inputs()) if wider else case.inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weight", ["dense", "transposed"])
    @pytest.mark.parametrize("shape", [(1, 256, 512), (5, 255, 257), (70, 129, 640)])
    def test_larger(self, backend: str, dtype: torch.dtype, weight: str, shape: tuple[int, int, int]) -> None:
        m, n, k = shape
        inputs = LinearCase(m=m, n=n, k=k, dtype=dtype, weight=weight, bias=True).inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))


def test_float64_passes_gradcheck() -> None:
    i = LinearCase(m=3, n=5, k=7, dtype=torch.float64, weight="dense", bias=True).inputs()
    assert i.bias is not None
    x, bias = i.x.requires_grad_(), i.bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, dense(i), b), (x, bias))


def test_the_weight_alone_is_saved(backend: str) -> None:
    i = LinearCase(m=4, n=64, k=64, weight="dense").inputs()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(i.x.requires_grad_(), dense(i))
    assert [t.data_ptr() for t in saved] == [dense(i).data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_multiplies_where_it_is_fast(dtype: torch.dtype) -> None:
    """And nowhere else: not one product of a weight that the library takes is left to it."""
    i = LinearCase(m=5, n=48, k=32, dtype=dtype, weight="dense", bias=True).inputs()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, lora_ops.use_backend("native"):
        frozen_linear(i.x.requires_grad_(), dense(i), i.bias).sum().backward()
    by_torch = {event.key for event in profiler.key_averages()} & {"aten::linear", "aten::mm", "aten::addmm"}
    assert bool(by_torch) != native_abi.takes_dense(dense(i)), by_torch


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (8, 4096), (40, 4096), (8, 9000)])
def test_sums_of_one_sign(backend: str, m: int, k: int) -> None:
    """Whose roundings do not cancel: where the parts of a long sum are added decides how wrong it is."""
    x, by_rows = torch.rand(m, k), torch.rand(64, k)
    exact = x.double() @ by_rows.double().T
    for w in (by_rows, by_rows.T.contiguous().T):
        ours, theirs = (
            float((y.double() - exact).norm() / exact.norm())
            for y in (frozen_linear(x, w), torch.nn.functional.linear(x, w))
        )
        assert ours <= 1.25 * theirs, (w.stride(), ours, theirs)


def test_double_backward(backend: str) -> None:
    i = LinearCase(m=3, n=5, k=7, dtype=torch.float64, weight="dense").inputs()
    with lora_ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: frozen_linear(x, dense(i)).square(), (i.x.requires_grad_(),))


def test_special_values_pass_through(backend: str) -> None:
    for dtype in DTYPES:
        x = torch.zeros(3, 8, dtype=dtype)
        x[1, 2], x[2, 3] = torch.inf, torch.nan
        y = frozen_linear(x, torch.ones(4, 8, dtype=dtype))
        assert torch.equal(y[0], torch.zeros(4, dtype=dtype))
        assert bool((y[1] == torch.inf).all())
        assert bool(y[2].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_gives_a_row_the_same_bits_again(backend: str, dtype: torch.dtype) -> None:
    i = LinearCase(m=50, n=33, k=65, dtype=dtype, weight="dense").inputs()
    assert frozen_linear(i.x[0], dense(i)).shape == (33,)
    assert torch.equal(frozen_linear(i.x, dense(i)), frozen_linear(i.x, dense(i)))


def test_empty_shapes(backend: str) -> None:
    assert frozen_linear(torch.ones(0, 8), torch.ones(4, 8)).shape == (0, 4)
    if backend == "reference":
        assert frozen_linear(torch.ones(3, 0), torch.ones(4, 0)).equal(torch.zeros(3, 4))
        assert frozen_linear(torch.ones(3, 8), torch.ones(0, 8)).shape == (3, 0)


def test_nf4_and_other_formats(backend: str) -> None:
    q, x = quantize_nf4(torch.randn(6, 8)), torch.randn(2, 8)
    with lora_ops.trace() as t:
        assert torch.equal(frozen_linear(x, q), nf4_linear(x, q))
    assert {c.op for c in t.calls} == {"nf4_linear"}


def test_autocast(backend: str) -> None:
    """As F.linear: runs in bfloat16, gives bfloat16, and returns gradients in the operands' own dtype."""
    i = LinearCase(m=6, n=10, k=16, weight="dense", bias=True).inputs()
    assert i.bias is not None
    x, bias = i.x.requires_grad_(), i.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), lora_ops.trace() as t:
        y = frozen_linear(x, dense(i), bias)
    assert y.dtype == torch.bfloat16
    assert t.calls[0].dtype == "bfloat16"
    assert torch.equal(y, frozen_linear(x.bfloat16(), dense(i).bfloat16(), bias.bfloat16()))
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_compile(backend: str, dtype: torch.dtype) -> None:
    i = LinearCase(m=6, n=10, k=16, dtype=dtype, weight="dense", bias=True).inputs()
    assert i.bias is not None
    x, bias = i.x.requires_grad_(), i.bias.requires_grad_()
    torch.library.opcheck(torch.ops.lora_ops.frozen_linear.default, (x, bias, *operands(dense(i))))
    torch.library.opcheck(torch.ops.lora_ops.frozen_linear_dx.default, (i.dy, *operands(dense(i))))
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dense(i), bias), frozen_linear(x, dense(i), bias))


def test_meta_tensors_give_shapes(backend: str) -> None:
    x, w = torch.empty(2, 3, 8, device="meta"), torch.empty(6, 8, device="meta")
    y = frozen_linear(x, w)
    assert (y.shape, y.device.type) == ((2, 3, 6), "meta")


def test_errors() -> None:
    w, x = torch.randn(6, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"x: expected \(..., K=8\), got \(2, 7\)"):
        frozen_linear(x[:, 1:], w)
    with pytest.raises(ValueError, match=r"x: expected dtype .*, got int64"):
        frozen_linear(torch.ones(2, 8, dtype=torch.int64), w)
    with pytest.raises(ValueError, match="weight: expected dtype float32, got bfloat16"):
        frozen_linear(x, w.bfloat16())
    with pytest.raises(ValueError, match=r"weight: expected \(N, K\), got \(8,\)"):
        frozen_linear(x, w[0])
    with pytest.raises(ValueError, match=r"weight: expected requires_grad=False .*F.linear does"):
        frozen_linear(x, w.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"bias: expected \(N=6\), got \(5,\)"):
        frozen_linear(x, w, torch.zeros(5))
    with pytest.raises(ValueError, match="bias: expected dtype float32, got bfloat16"):
        frozen_linear(x, w, torch.zeros(6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"weight: expected device cpu .*, got meta"):
        frozen_linear(x, w.to("meta"))
