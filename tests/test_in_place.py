"""Outputs may be changed in place, as F.linear's may: no op returns a view, or memory that its backward reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_ops
from lora_ops.functional import dequantize_nf4, frozen_linear, lora_linear, nf4_linear, quantize_nf4
from lora_ops.nn import LoRALinear, NF4Linear
from lora_ops.quant.blockwise8 import dequantize_blockwise8, quantize_blockwise8
from lora_ops.quant.frozen import operands
from lora_ops.runtime.dispatch import OPS

K, N, R = 32, 48, 4
SHAPES = [(K,), (3, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)]
LINEARS = ["lora_linear", "lora_linear nf4", "nf4_linear", "frozen_linear"]
Linear = Callable[[Tensor], Tensor]


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def linear(kind: str) -> tuple[Linear, list[Tensor]]:
    """An op as a function of x, and its other operands that take a gradient."""
    w, a, b, bias = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R), torch.randn(N)
    for t in (a, b, bias):
        t.requires_grad_()
    q = quantize_nf4(w, double_quant=True)
    if kind == "nf4_linear":
        return lambda x: nf4_linear(x, q, bias), [bias]
    if kind == "frozen_linear":
        return lambda x: frozen_linear(x, w.to(x.dtype), bias), [bias]
    weight = q if kind.endswith("nf4") else w
    return lambda x: lora_linear(x, weight, a, b, scale=2.0, bias=bias, dropout_p=0.25, seed=1), [a, b, bias]


def changed_in_place(y: Tensor, other: Tensor) -> Tensor:
    """What models do to the output of a linear layer."""
    y += other.to(y.dtype)
    y *= 0.5
    y.masked_fill_(y < -1, 0.0)
    y[..., 0] = 0.0
    y[..., 1:3] += 1.0
    return F.relu(y, inplace=True)


def changed(y: Tensor, other: Tensor) -> Tensor:
    """The same in new tensors."""
    y = (y + other.to(y.dtype)) * 0.5
    y = y.masked_fill(y < -1, 0.0)
    columns = torch.arange(y.shape[-1])
    y = y.masked_fill(columns == 0, 0.0)
    return F.relu(y + ((columns == 1) | (columns == 2)).to(y.dtype))


def grads(f: Linear, change: Callable[[Tensor, Tensor], Tensor], x: Tensor, others: list[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    scale = torch.linspace(0.5, 2.0, N, requires_grad=True)  # the change takes part in the graph as well
    y = change(f(x), scale)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, scale, *others])]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kind", LINEARS)
def test_in_place_is_out_of_place(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    f, others = linear(kind)
    x = torch.randn(shape)
    for got, expected in zip(grads(f, changed_in_place, x, others), grads(f, changed, x, others), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K)], ids=shape_id)
@pytest.mark.parametrize("kind", LINEARS)
def test_under_autocast(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    f, others = linear(kind)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (grads(f, change, x, others) for change in (changed_in_place, changed))
    assert got[0].dtype == torch.bfloat16
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("kind", LINEARS)
def test_under_compile(backend: str, kind: str) -> None:
    f, others = linear(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, s: changed_in_place(f(x), s), fullgraph=True, backend=counter)
    x = torch.randn(2, 3, K, requires_grad=True)
    s = torch.linspace(0.5, 2.0, N)
    got = torch.autograd.grad(compiled(x, s).sum(), [x, *others])
    expected = torch.autograd.grad(changed(f(x), s).sum(), [x, *others])
    assert counter.frame_count == 1
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    # What a compiled graph returns may be changed outside of it.
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(changed_in_place(y, s).sum(), [x, *others])[0], expected[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K)], ids=shape_id)
@pytest.mark.parametrize("kind", LINEARS)
def test_without_gradients(
    backend: str, kind: str, shape: tuple[int, ...], mode: Callable[[], torch.no_grad | torch.inference_mode]
) -> None:
    """A view that was made without a graph could not take part in one afterwards."""
    f, _ = linear(kind)
    x, other = torch.randn(shape), torch.linspace(0.5, 2.0, N)
    with mode():
        y = f(x)
        torch.testing.assert_close(changed_in_place(f(x), other), changed(f(x), other))
    assert not y._is_view()
    if mode is torch.no_grad:
        scale = other.clone().requires_grad_()
        y.mul_(scale).sum().backward()
        torch.testing.assert_close(scale.grad, f(x).reshape(-1, N).sum(0).detach())


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K)], ids=shape_id)
@pytest.mark.parametrize("kind", LINEARS)
def test_gradients_may_be_changed(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    """In hooks, in .grad, and where autograd tracks the backward."""
    f, others = linear(kind)
    x = torch.randn(shape, requires_grad=True)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    f(x).sum().backward()
    assert not any(t.grad._is_view() for t in (x, *others))
    x.register_hook(lambda g: g.mul_(2))
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x)[0], 2 * expected)
    tracked = torch.autograd.grad(f(x * 1.0).square().sum(), (x, *others), create_graph=True)
    for g in tracked:
        g.add_(1.0)


@pytest.mark.parametrize("kind", ["lora_linear", "lora_linear nf4"])
@pytest.mark.parametrize("which", ["x", "lora_a", "lora_b"])
def test_what_the_backward_reads_may_not(backend: str, kind: str, which: str) -> None:
    """Torch's own error, as for F.linear, and not gradients of other values."""
    f, (a, b, _) = linear(kind)
    x = torch.randn(2, 3, K, requires_grad=True)
    inner = x * 1.0
    y = f(inner)
    with torch.no_grad():
        {"x": inner, "lora_a": a, "lora_b": b}[which].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_that_changed_is_told(backend: str) -> None:
    q = quantize_nf4(torch.randn(N, K))
    x = torch.randn(2, 3, K, requires_grad=True)
    y = nf4_linear(x, q)
    q.absmax.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nf4_linear_does_not_keep_x(backend: str) -> None:
    """Its x may be changed, as that of F.linear over a frozen weight may."""
    q = quantize_nf4(torch.randn(N, K))
    x = torch.randn(2, 3, K, requires_grad=True)
    inner = x * 1.0
    y = nf4_linear(inner, q)
    inner.zero_()
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, dequantize_nf4(q).sum(0).expand_as(x))


def every_op() -> dict[str, tuple[Tensor, ...]]:
    """What each op returns, by its name; adamw_ and dequantize_nf4_out write into their arguments."""
    x, w, a, b = torch.randn(2, 3, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    q, ops, scale = quantize_nf4(w), torch.ops.lora_ops, torch.tensor(2.0)
    codes, absmax = ops.quantize_blockwise8(x, 256, True)
    y, s = ops.lora_linear(x, None, a, b, scale, 0.0, None, *operands(q))
    needs = [True, True, True, True]
    return {
        "quantize_nf4": ops.quantize_nf4(w, 64),
        "dequantize_nf4": (ops.dequantize_nf4(*operands(q), torch.float32),),
        "quantize_blockwise8": (codes, absmax),
        "dequantize_blockwise8": (ops.dequantize_blockwise8(codes, absmax, 256, True),),
        "nf4_linear": (ops.nf4_linear(x, None, *operands(q)),),
        "nf4_linear_dx": (ops.nf4_linear_dx(y, *operands(q)),),
        "frozen_linear": (ops.frozen_linear(x, None, *operands(w)),),
        "frozen_linear_dx": (ops.frozen_linear_dx(y, *operands(w)),),
        "lora_linear": (y, s),
        "lora_linear_backward": ops.lora_linear_backward(y, x, s, a, b, scale, 0.0, None, needs, *operands(q)),
    }


def test_no_op_returns_a_view(backend: str) -> None:
    results = every_op()
    assert set(results) == {name for name in OPS if not name.endswith(("_", "_out"))}, "name a new op in every_op"
    for name, tensors in results.items():
        assert not [t.shape for t in tensors if t._is_view()], name
    memory = [t.untyped_storage().data_ptr() for tensors in results.values() for t in tensors]
    assert len(set(memory)) == len(memory)


def test_the_codecs_results_may_join_a_graph(backend: str) -> None:
    q = quantize_nf4(torch.randn(2, 3, 64), double_quant=True)
    codes, absmax = quantize_blockwise8(torch.randn(2, 3, 64))
    with torch.no_grad():
        results = dequantize_nf4(q), q.dequantize(torch.bfloat16), dequantize_blockwise8(codes, absmax)
    scale = torch.ones(64, requires_grad=True)
    for t in results:
        t.mul_(scale).sum().backward()
    q.absmax.add_(1)
    codes.add_(1)


class Residual(nn.Module):
    """A model that changes what its layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        y.clamp_(min=-1.0)
        y[..., 0] = 0.0
        z = self.second(F.gelu(y))
        z.mul_(x).add_(y)
        return z


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "NF4Linear": NF4Linear.from_linear,
    "LoRALinear": lambda m: LoRALinear.from_linear(m, r=R),
    "LoRALinear nf4": lambda m: LoRALinear.from_linear(m, r=R, quantize="nf4"),
}


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (2, 1, 3, K)], ids=shape_id)
@pytest.mark.parametrize("layer", [*LAYERS, "inject", "inject nf4"])
def test_modules(backend: str, layer: str, shape: tuple[int, ...]) -> None:
    """Against the same model in which each layer's output is copied first."""
    model: nn.Module = Residual()
    if layer in LAYERS:
        model.first, model.second = LAYERS[layer](model.first), LAYERS[layer](model.second)
    else:
        model = lora_ops.inject(model, r=R, quantize="nf4" if layer.endswith("nf4") else None)
    x = torch.randn(shape, requires_grad=True)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    layers = [m for name, m in model.named_modules() if name.endswith(("first", "second"))]
    assert len(layers) == 2
    for m in layers:
        m.register_forward_hook(lambda module, args, y: y.clone())
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, expected)
