"""lora_linear on every backend against float64: outputs, every gradient, dropout, memory, autocast, compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_ops
from lora_ops.functional import dequantize_nf4, lora_linear, nf4_linear, quantize_nf4
from lora_ops.kernels.philox import dropout_mask, keep_scale
from lora_ops.quant.frozen import operands
from tests.cases import LinearCase, LinearInputs, assert_right, backends_here, run_ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

cases = st.builds(
    LinearCase,
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    r=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, torch.float32]),
    weight=st.sampled_from(["dense", "nf4"]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 0.5, 2.0, 16.0]),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    contiguous=st.booleans(),
    ill_scaled=st.booleans(),
    zero_b=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("backend", backends_here())
class TestAgainstFloat64:
    @given(case=cases)
    def test_drawn(self, backend: str, case: LinearCase) -> None:
        inputs = case.inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))

    @pytest.mark.parametrize("weight", ["dense", "nf4"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("m", "n", "k", "r"), [(300, 129, 640, 8), (1, 256, 512, 64), (700, 300, 1100, 16)])
    def test_larger(self, backend: str, dtype: torch.dtype, weight: str, m: int, n: int, k: int, r: int) -> None:
        """Sizes that span several row chunks."""
        inputs = LinearCase(
            m=m, n=n, k=k, r=r, dtype=dtype, weight=weight, adapter_dtype=torch.float32, dropout_p=0.1, bias=True
        ).inputs()
        with lora_ops.use_backend(backend):
            assert_right(inputs, run_ours(inputs))


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(weight: str, dropout_p: float) -> None:
    case = LinearCase(
        m=3, n=5, k=9, r=2, dtype=torch.float64, weight=weight, bias=True, dropout_p=dropout_p, batch=(2,)
    )
    i = case.inputs()
    leaves = tuple(t.requires_grad_() for t in (i.x, *i.adapter(), i.bias))

    def f(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, i.weight, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)

    assert torch.autograd.gradcheck(f, leaves)


def test_dropout_is_the_documented_mask(backend: str) -> None:
    """With W = 0, A = I and B = I the layer is dropout itself."""
    x, eye = torch.randn(20, 24), torch.eye(24)
    y = lora_linear(x, torch.zeros(24, 24), eye, eye, scale=1.0, dropout_p=0.3, seed=11)
    mask = dropout_mask(slice(0, 20), 24, 0.3, torch.tensor(11))
    assert torch.equal(y != 0, mask)
    torch.testing.assert_close(y[mask], x[mask] * keep_scale(0.3))


def test_seed_comes_from_torchs_generator(backend: str) -> None:
    i = LinearCase(m=16, n=8, k=32, r=4, weight="dense").inputs()

    def run() -> torch.Tensor:
        return lora_linear(i.x, i.weight, *i.adapter(), scale=1.0, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(i.x, i.weight, *i.adapter(), scale=1.0)  # no dropout draws nothing
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_mask(backend: str, use_reentrant: bool) -> None:
    i = LinearCase(m=16, n=8, k=32, r=4, weight="nf4", dropout_p=0.5).inputs()
    grads = []
    for recompute in (False, True):
        x, a, b = (t.detach().requires_grad_() for t in (i.x, *i.adapter()))

        def f(x: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return lora_linear(x, i.weight, a, b, scale=2.0, dropout_p=0.5)

        torch.manual_seed(9)
        y = checkpoint(f, x, use_reentrant=use_reentrant) if recompute else f(x)
        y.backward(i.dy)
        grads.append([t.grad for t in (x, a, b)])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yield saved


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_memory_contract(backend: str, weight: str, dropout_p: float) -> None:
    """Saved are x itself (no copy), S of [M, R], the operands that exist anyway, and no mask."""
    i = LinearCase(
        m=64, n=96, k=128, r=4, dtype=torch.bfloat16, weight=weight, adapter_dtype=torch.float32, double_quant=True
    ).inputs()
    x, a, b = (t.requires_grad_() for t in (i.x, *i.adapter()))
    with saved_tensors() as saved:
        y = lora_linear(x, i.weight, a, b, scale=2.0, dropout_p=dropout_p, seed=1)
    held = {t.data_ptr() for t in (x, a, b, *(i.nf4.tensors() if weight == "nf4" else (i.weight,)))}
    new = [t for t in saved if t.data_ptr() not in held and t.numel() > 1]  # scale and seed are 0-d
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert [tuple(t.shape) for t in new] == [(64, 4)]
    y.sum().backward()
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_only_what_is_needed_is_saved_and_computed(backend: str) -> None:
    i = LinearCase(m=8, n=6, k=16, r=4, weight="dense").inputs()
    a, b = i.adapter()
    with saved_tensors() as saved:  # x needs no gradient, A is frozen: x is not kept
        y = lora_linear(i.x, i.weight, a, b.requires_grad_(), scale=2.0)
    assert i.x.data_ptr() not in {t.data_ptr() for t in saved}
    y.backward(i.dy)
    assert i.x.grad is None
    assert a.grad is None
    torch.testing.assert_close(b.grad, 2.0 * i.dy.T @ (i.x @ a.T))


def test_gradients_of_fp32_adapters_are_not_rounded(backend: str) -> None:
    i = LinearCase(m=64, n=32, k=32, r=4, dtype=torch.bfloat16, weight="dense", adapter_dtype=torch.float32).inputs()
    got = run_ours(i)
    for name in ("dlora_a", "dlora_b"):
        assert got[name].dtype == torch.float32
        assert not torch.equal(got[name], got[name].bfloat16().float())


def test_operands_are_not_written(backend: str) -> None:
    i = LinearCase(m=4, n=6, k=8, r=2, bias=True, dropout_p=0.2).inputs()
    tensors = (i.x, i.dy, i.bias, *i.adapter(), *i.nf4.tensors(), i.seed)
    before = [t.clone() for t in tensors]
    run_ours(i)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t, old)


def test_zero_b_is_the_base_layer(backend: str) -> None:
    i = LinearCase(m=9, n=12, k=20, r=4, bias=True, zero_b=True, dropout_p=0.3).inputs()
    y = lora_linear(i.x, i.weight, *i.adapter(), scale=2.0, bias=i.bias, dropout_p=0.3)
    torch.testing.assert_close(y, nf4_linear(i.x, i.nf4, i.bias))


def test_special_values_pass_through(backend: str) -> None:
    i = LinearCase(m=3, n=4, k=8, r=2, weight="dense").inputs()
    i.x[1, 2] = torch.nan
    y = lora_linear(i.x, i.weight, *i.adapter(), scale=1.0, dropout_p=0.5, seed=1)
    assert bool(y[1].isnan().all())
    assert not bool(y[[0, 2]].isnan().any())


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0)])
def test_weights_without_elements(n: int, k: int, weight: str) -> None:
    """As torch takes them: y is the bias."""
    w = torch.empty(n, k)
    x, a, b = (torch.ones(shape, requires_grad=True) for shape in ((3, k), (2, k), (n, 2)))
    bias = torch.ones(n, requires_grad=True)
    y = lora_linear(x, quantize_nf4(w) if weight == "nf4" else w, a, b, scale=1.0, bias=bias, dropout_p=0.5)
    assert torch.equal(y, torch.ones(3, n))
    y.sum().backward()
    assert [t.grad is not None and t.grad.shape == t.shape for t in (x, a, b, bias)] == [True] * 4
    assert torch.equal(b.grad, torch.zeros(n, 2))
    assert torch.equal(bias.grad, torch.full((n,), 3.0))


def test_repeatable(backend: str) -> None:
    i = LinearCase(m=128, n=96, k=160, r=8, dtype=torch.bfloat16, dropout_p=0.1).inputs()
    first, second = run_ours(i), run_ours(i)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_autocast(backend: str, weight: str) -> None:
    """x, W and bias run in bfloat16, the adapter stays float32; gradients come in the operands' own dtype."""
    i: LinearInputs = LinearCase(m=6, n=10, k=16, r=4, weight=weight, bias=True).inputs()
    x, a, b, bias = (t.requires_grad_() for t in (i.x, *i.adapter(), i.bias))
    with torch.autocast("cpu", torch.bfloat16), lora_ops.trace() as t:
        y = lora_linear(x, i.weight, a, b, scale=2.0, bias=bias)
    assert y.dtype == torch.bfloat16
    assert t.calls[0].dtype == "bfloat16"
    w16 = i.weight if weight == "nf4" else i.weight.bfloat16()
    assert torch.equal(y, lora_linear(x.bfloat16(), w16, a, b, scale=2.0, bias=bias.bfloat16()))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, a, b, bias))


def test_opcheck(backend: str) -> None:
    for case in (
        LinearCase(m=6, n=10, k=16, r=4, weight="dense", bias=True, dropout_p=0.1),
        LinearCase(m=6, n=10, k=16, r=4, weight="nf4", double_quant=True, batch=(2,)),
    ):
        i = case.inputs()
        x, a, b = (t.requires_grad_() for t in (i.x, *i.adapter()))
        scale, seed = torch.tensor(2.0), i.seed if case.dropout_p else None
        args = (x, i.bias, a, b, scale, case.dropout_p, seed, *operands(i.weight))
        torch.library.opcheck(torch.ops.lora_ops.lora_linear.default, args)
        s = torch.randn(*i.x.shape[:-1], 4)
        needs = [True, True, False, True]
        args = (i.dy, x.detach(), s, a.detach(), b.detach(), scale, case.dropout_p, seed, needs, *operands(i.weight))
        torch.library.opcheck(torch.ops.lora_ops.lora_linear_backward.default, args)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_compiles_without_break_or_recompile(backend: str, weight: str) -> None:
    i = LinearCase(m=8, n=12, k=16, r=4, weight=weight, double_quant=True).inputs()
    x, a, b = (t.requires_grad_() for t in (i.x, *i.adapter()))
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def f(x: torch.Tensor, scale: float | torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
        return lora_linear(x, i.weight, a, b, scale=scale, dropout_p=0.25, seed=seed)

    for n in range(3):
        scale, seed = torch.tensor(0.5 + n), torch.tensor(7 + n)
        y = f(x, scale, seed)
        expected = lora_linear(x, i.weight, a, b, scale=scale, dropout_p=0.25, seed=seed)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), a)[0], torch.autograd.grad(expected.sum(), a)[0])
    assert counter.frame_count == 1
    for n in range(4):  # plain numbers: the first is a constant, from the second on they are inputs of the graph
        f(x, 0.5 + n, 7 + n)
    assert counter.frame_count <= 3


def test_inductor(backend: str) -> None:
    i = LinearCase(m=8, n=12, k=16, r=4, dropout_p=0.25).inputs()
    x, a, b = (t.requires_grad_() for t in (i.x, *i.adapter()))

    def f(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x.sin(), i.weight, a, b, scale=2.0, dropout_p=0.25, seed=i.seed).cos()

    results = []
    for g in (f, torch.compile(f, fullgraph=True)):
        y = g(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, a, b))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_equals_the_docstrings_pytorch(backend: str) -> None:
    i = LinearCase(m=9, n=12, k=20, r=4, bias=True).inputs()
    a, b = i.adapter()
    linear = torch.nn.functional.linear
    expected = linear(i.x, dequantize_nf4(i.nf4), i.bias) + 1.5 * linear(linear(i.x, a), b)
    torch.testing.assert_close(lora_linear(i.x, i.nf4, a, b, scale=1.5, bias=i.bias), expected)


def test_errors() -> None:
    i = LinearCase(m=3, n=6, k=8, r=2, weight="dense").inputs()
    x, w, (a, b) = i.x, i.weight, i.adapter()
    ok = {"scale": 1.0}
    with pytest.raises(ValueError, match=r"lora_a: expected \(R=2, K=8\), got \(2, 7\)"):
        lora_linear(x, w, a[:, 1:], b, **ok)
    with pytest.raises(ValueError, match=r"lora_b: expected \(N=6, R=2\), got \(6, 1\)"):
        lora_linear(x, w, a, b[:, :1], **ok)
    with pytest.raises(ValueError, match=r"lora_a: expected \(R >= 1, K=8\), got \(0, 8\)"):
        lora_linear(x, w, a[:0], b[:, :0], **ok)
    with pytest.raises(ValueError, match="weight: expected dtype float32, got bfloat16"):
        lora_linear(x, w.bfloat16(), a, b, **ok)
    with pytest.raises(ValueError, match="lora_a: expected dtype float32, got bfloat16"):
        lora_linear(x, w, a.bfloat16(), b, **ok)
    with pytest.raises(ValueError, match="weight: expected requires_grad=False"):
        lora_linear(x, w.clone().requires_grad_(), a, b, **ok)
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\], got 1.5"):
        lora_linear(x, w, a, b, scale=1.0, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\], got nan"):
        lora_linear(x, w, a, b, scale=1.0, dropout_p=float("nan"))
    for p in (None, "0.1", torch.tensor(0.1)):
        with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\], got .*(None|0.1)"):
            lora_linear(x, w, a, b, scale=1.0, dropout_p=p)  # type: ignore[arg-type]
    for scale in (None, "2", 2j):
        with pytest.raises(ValueError, match=r"scale: expected a number or a floating 0-d tensor, got (None|'2'|2j)"):
            lora_linear(x, w, a, b, scale=scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed: expected an integer or an int64 0-d tensor, got 1\.5"):
        lora_linear(x, w, a, b, scale=1.0, dropout_p=0.1, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale: expected requires_grad=False"):
        lora_linear(x, w, a, b, scale=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="scale: expected a number or a floating 0-d tensor"):
        lora_linear(x, w, a, b, scale=torch.ones(2))
    with pytest.raises(ValueError, match="seed: expected an int64 0-d tensor on cpu"):
        lora_linear(x, w, a, b, scale=1.0, dropout_p=0.1, seed=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x: expected dtype .*, got int64"):
        lora_linear(x.long(), w, a, b, **ok)
    with pytest.raises(TypeError, match=r"lora_b: expected a torch.Tensor, got NoneType"):
        lora_linear(x, w, a, None, **ok)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias: expected device cpu .*, got meta"):
        lora_linear(x, w, a, b, bias=torch.zeros(6, device="meta"), **ok)
