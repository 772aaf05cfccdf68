"""nf4_linear on every backend against float64: outputs, gradients, ragged and empty shapes, autocast, compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_ops
from lora_ops.functional import dequantize_nf4, nf4_linear, quantize_nf4
from lora_ops.quant.frozen import operands
from lora_ops.quant.nf4 import BLOCK_SIZES
from tests.cases import LinearCase, assert_right, backends_here, run_ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

cases = st.builds(
    LinearCase,
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    bias=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("backend", backends_here())
class TestAgainstFloat64:
    @given(case=cases)
    def test_drawn(self, backend: str, case: LinearCase) -> None:
        inputs = case.inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 256, 512), (5, 255, 257), (300, 129, 640)])
    def test_larger(self, backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        m, n, k = shape
        inputs = LinearCase(m=m, n=n, k=k, dtype=dtype, bias=True, double_quant=True).inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))


def test_float64_is_exact_and_passes_gradcheck() -> None:
    inputs = LinearCase(m=3, n=5, k=7, dtype=torch.float64, bias=True).inputs()
    x, bias = inputs.x.requires_grad_(), inputs.bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, inputs.nf4, b), (x, bias))


def test_nothing_dense_is_saved(backend: str) -> None:
    inputs = LinearCase(m=4, n=64, k=64, double_quant=True).inputs()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4_linear(inputs.x.requires_grad_(), inputs.nf4)
    q = inputs.nf4
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in q.tensors()}
    assert sum(t.numel() * t.element_size() for t in saved) == q.nbytes


def test_operands_are_not_written(backend: str) -> None:
    inputs = LinearCase(m=4, n=6, k=8, bias=True).inputs()
    before = [t.clone() for t in (inputs.x, inputs.dy, inputs.bias, *inputs.nf4.tensors())]
    run_ours(inputs)
    for t, old in zip((inputs.x, inputs.dy, inputs.bias, *inputs.nf4.tensors()), before, strict=True):
        assert torch.equal(t, old)


def test_meta_tensors_give_shapes(backend: str) -> None:
    q = quantize_nf4(torch.randn(6, 8))
    q = replace(q, packed=q.packed.to("meta"), absmax=q.absmax.to("meta"))
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    y = nf4_linear(x, q, torch.empty(6, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.bfloat16, "meta")


def test_special_values_pass_through(backend: str) -> None:
    q = quantize_nf4(torch.ones(4, 8))
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.inf, torch.nan
    y = nf4_linear(x, q)
    assert torch.equal(y[0], torch.zeros(4))
    assert bool((y[1] == torch.inf).all())
    assert bool(y[2].isnan().all())


def test_vector_input_and_repeatability(backend: str) -> None:
    q = quantize_nf4(torch.randn(33, 65))
    x = torch.randn(65)
    assert nf4_linear(x, q).shape == (33,)
    x = torch.randn(50, 65, dtype=torch.bfloat16)
    assert torch.equal(nf4_linear(x, q), nf4_linear(x, q))


def test_autocast(backend: str) -> None:
    """As F.linear: runs in bfloat16, gives bfloat16, and returns gradients in the operands' own dtype."""
    inputs = LinearCase(m=6, n=10, k=16, bias=True).inputs()
    x, bias = inputs.x.requires_grad_(), inputs.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), lora_ops.trace() as t:
        y = nf4_linear(x, inputs.nf4, bias)
    assert y.dtype == torch.bfloat16
    assert t.calls[0].dtype == "bfloat16"
    expected = nf4_linear(x.bfloat16(), inputs.nf4, bias.bfloat16())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert nf4_linear(x, inputs.nf4, bias).dtype == torch.float32


def test_opcheck_and_compile(backend: str) -> None:
    inputs = LinearCase(m=6, n=10, k=16, bias=True, double_quant=True).inputs()
    x, bias = inputs.x.requires_grad_(), inputs.bias.requires_grad_()
    torch.library.opcheck(torch.ops.lora_ops.nf4_linear.default, (x, bias, *operands(inputs.nf4)))
    torch.library.opcheck(torch.ops.lora_ops.nf4_linear_dx.default, (inputs.dy, *operands(inputs.nf4)))
    compiled = torch.compile(nf4_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, inputs.nf4, bias), nf4_linear(x, inputs.nf4, bias))


def test_errors() -> None:
    q = quantize_nf4(torch.randn(6, 8))
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"x: expected \(..., K=8\), got \(2, 7\)"):
        nf4_linear(x[:, 1:], q)
    with pytest.raises(ValueError, match=r"x: expected dtype .*, got int64"):
        nf4_linear(torch.ones(2, 8, dtype=torch.int64), q)
    with pytest.raises(ValueError, match=r"bias: expected \(N=6\), got \(5,\)"):
        nf4_linear(x, q, torch.zeros(5))
    with pytest.raises(ValueError, match="bias: expected dtype float32, got bfloat16"):
        nf4_linear(x, q, torch.zeros(6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"q: expected 2 dimensions, got shape \(8,\)"):
        nf4_linear(x, quantize_nf4(torch.randn(8)))
    with pytest.raises(ValueError, match=r"q: expected device cpu .*, got meta"):
        nf4_linear(x, replace(q, packed=q.packed.to("meta")))
    with pytest.raises(TypeError, match="q: expected an NF4Tensor"):
        nf4_linear(x, dequantize_nf4(q))  # type: ignore[arg-type]
