"""Backends: the choice, the reasons, the trace."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ops
from lora_ops.functional import dequantize_nf4, frozen_linear, lora_linear, nf4_linear, quantize_nf4
from lora_ops.kernels.lora_linear.operands import Adapter
from lora_ops.runtime import backends, dispatch, native, triton_launch
from lora_ops.runtime.backends import BackendError
from lora_ops.runtime.dispatch import OPS
from lora_ops.runtime.plain_call import is_plain_call


@pytest.fixture
def q() -> lora_ops.NF4Tensor:
    return quantize_nf4(torch.randn(8, 16))


@pytest.mark.parametrize("name", ["lora_linear", "nf4_linear", "frozen_linear"])
def test_forward_mode_is_refused_and_not_zero(backend: str, name: str) -> None:
    w, a, b, x = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2), torch.randn(3, 16)
    q = quantize_nf4(w)
    op = {
        "lora_linear": lambda x: lora_linear(x, w, a, b, scale=1.0),
        "nf4_linear": lambda x: nf4_linear(x, q),
        "frozen_linear": lambda x: frozen_linear(x, w),
    }[name]
    with pytest.raises(NotImplementedError, match=r"no forward-mode gradient .* take reverse mode"):
        torch.func.jvp(op, (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward-mode gradient"), forward_ad.dual_level():
        op(forward_ad.make_dual(x, x))
    _, tangent = torch.func.jvp(lambda z: z + op(x).sum(), (x,), (x,))  # a constant there has no tangent to lose
    assert torch.equal(tangent, x)
    with forward_ad.dual_level():
        assert torch.equal(op(x), op(x))


def test_trace_tells_backend_dtype_and_count(q: lora_ops.NF4Tensor) -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    with lora_ops.use_backend("reference"), lora_ops.trace() as outer:
        nf4_linear(x, q)
        with lora_ops.trace() as inner:
            nf4_linear(x, q).sum().backward()
    assert [(c.op, c.backend, c.dtype, c.shape) for c in inner.calls] == [
        ("nf4_linear", "reference", "bfloat16", (3, 16)),
        ("nf4_linear_dx", "reference", "bfloat16", (3, 8)),
    ]
    row = {"op": "nf4_linear", "backend": "reference", "device": "cpu", "dtype": "bfloat16", "reason": "asked for"}
    assert outer.summary()[0] == {**row, "count": 2}
    assert outer.backends("nf4_linear_dx") == {"reference"}
    assert "nf4_linear_dx" in str(outer)
    assert str(lora_ops.Trace()) == "no lora_ops op was called"


def test_needless_gradients_are_not_computed(q: lora_ops.NF4Tensor) -> None:
    x, bias = torch.randn(3, 16), torch.randn(8, requires_grad=True)
    with lora_ops.trace() as t:
        nf4_linear(x, q, bias).sum().backward()
    assert [c.op for c in t.calls] == ["nf4_linear"]
    assert torch.equal(bias.grad, torch.full((8,), 3.0))


def test_auto_prefers_native(q: lora_ops.NF4Tensor) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(f"native backend: {reason}")
    with lora_ops.trace() as t:
        dequantize_nf4(q)
    assert t.backends() == {"native"}


def test_asked_for_by_name_and_not_served_raises(q: lora_ops.NF4Tensor) -> None:
    x = torch.randn(2, 16, dtype=torch.float64)
    with lora_ops.use_backend("native"), pytest.raises(lora_ops.BackendError, match=r"'native' was asked for.*float64"):
        nf4_linear(x, q)
    with lora_ops.use_backend("cuda"), pytest.raises(lora_ops.BackendError, match="nf4 has no cuda kernel"):
        dequantize_nf4(q)


def test_declining_is_told_once(q: lora_ops.NF4Tensor, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._told.clear()
    x = torch.randn(2, 16, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="lora_ops"), lora_ops.trace() as t:
        nf4_linear(x, q)
        nf4_linear(x, q)
    assert len(caplog.records) == 1
    assert "nf4_linear: the native backend declined" in caplog.text
    assert t.calls[0].backend == "reference"
    assert t.calls[0].reason.startswith("native: ")


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"use_backend: expected one of .*, auto, got 'metal'"),
        lora_ops.use_backend("metal"),
    ):
        pass


def test_environment_variable(q: lora_ops.NF4Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = backends._backend_of_environment.cache_clear
    monkeypatch.setenv("LORA_OPS_BACKEND", "reference")
    forget()
    with lora_ops.trace() as t:
        dequantize_nf4(q)
    assert t.backends() == {"reference"}
    with lora_ops.use_backend("auto"), lora_ops.trace() as t:
        dequantize_nf4(q)
    assert t.backends() == {"native" if native.available() else "reference"}
    monkeypatch.setenv("LORA_OPS_BACKEND", "fast")
    forget()
    try:
        with pytest.raises(ValueError, match="LORA_OPS_BACKEND: expected one of"):
            dequantize_nf4(q)
    finally:
        monkeypatch.undo()
        forget()


class Watching(TorchDispatchMode):
    """Counts the ops that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_plain_calls() -> None:
    """Only a call that nothing could see may go around the dispatcher."""
    x, bias = torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(4))
    plain = is_plain_call
    assert plain(x, None)
    assert not plain(x, bias)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert plain(x, bias)
            assert plain(torch.zeros(2), x)
    watchers: list[AbstractContextManager] = [Watching(), FakeTensorMode(), torch.autocast("cpu"), profile()]
    for watcher in watchers:
        with watcher:
            assert not plain(x)
    torch.vmap(lambda row: row if not plain(row) else pytest.fail("vmap"))(x)
    make_fx(lambda t: t if not plain(t) else pytest.fail("make_fx"))(x)
    assert torch.compile(lambda t: t + plain(t), backend="eager", fullgraph=True)(x).eq(0).all()
    assert not plain(FakeTensorMode().from_tensor(x))
    assert not plain(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    assert not plain(torch.zeros(2, dtype=torch.complex64).conj())
    assert not plain(torch.zeros(2, 2).to_sparse())
    assert not plain(torch.zeros(2, device="meta"))
    assert plain(x)


def test_who_watches_sees_the_op(q: lora_ops.NF4Tensor) -> None:
    x, a, b = torch.randn(2, 16), torch.randn(4, 16), torch.randn(8, 4)

    def run() -> None:
        nf4_linear(x, q)
        lora_linear(x, q, a, b, scale=1.0)

    with Watching() as mode:
        run()
    assert {"lora_ops::nf4_linear", "lora_ops::lora_linear"} <= set(mode.seen)
    with profile() as record:
        run()
    assert {"lora_ops::nf4_linear", "lora_ops::lora_linear"} <= {event.key for event in record.key_averages()}


def test_around_the_dispatcher_bits_are_the_same(q: lora_ops.NF4Tensor) -> None:
    x, a, b = torch.randn(3, 2, 16), torch.randn(4, 16), torch.randn(8, 4)
    for run in (lambda: nf4_linear(x, q), lambda: lora_linear(x, q, a, b, scale=0.5, dropout_p=0.5, seed=3)):
        with lora_ops.trace() as direct:
            y = run()
        with Watching(), lora_ops.trace() as dispatched:
            assert torch.equal(run(), y)
        assert direct.calls == dispatched.calls
        with torch.inference_mode():
            assert torch.equal(run(), y)


def test_double_backward_is_an_error(q: lora_ops.NF4Tensor) -> None:
    x = torch.randn(2, 16, requires_grad=True)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    for y in (nf4_linear(x, q), lora_linear(x, q, a, b, scale=1.0)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward"):
            dx.sum().backward()


def test_without_a_native_library_everything_works_and_says_so() -> None:
    """A fresh process whose library is missing: the reference serves, with a warning that names the cost's remedy."""
    code = (
        "import pathlib, lora_ops.runtime.native as n; n.LIBRARY_PATH = pathlib.Path('missing.so')\n"
        "import torch, lora_ops\n"
        "from lora_ops.functional import quantize_nf4\n"
        "with lora_ops.trace() as t: quantize_nf4(torch.randn(64))\n"
        "print(t.backends())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'reference'}"
    assert "native library was not built" in done.stderr


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """A GPU of this compute capability, as far as Triton's launches ask."""

    def has(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        triton_launch._capability_of.cache_clear()

    yield has
    triton_launch._capability_of.cache_clear()


def test_triton_declines_old_gpus(gpu_of: Callable[[int, int], None]) -> None:
    """Before 7.5 everything; at 7.5 products in bfloat16, which have no instruction there, and nothing else."""
    pytest.importorskip("triton")
    from lora_ops.quant.blockwise8 import triton_impl as blockwise8
    from lora_ops.quant.nf4.codec import triton_impl as codec
    from lora_ops.quant.nf4.linear import triton_impl as linear

    def reasons(dtype: torch.dtype) -> dict[str, str | None]:
        with FakeTensorMode():
            x = torch.empty(64, 64, device="cuda:0", dtype=dtype)
        return {
            "quantize_nf4": codec.declines("quantize_nf4", x, w=x, block_size=64),
            "dequantize_nf4": codec.declines("dequantize_nf4", x, q=x, dtype=dtype),
            "quantize_blockwise8": blockwise8.declines("quantize_blockwise8", x, x=x, block_size=64, signed=True),
            "nf4_linear": linear.declines("nf4_linear", x, x=x, q=None, bias=None),
        }

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        gpu_of(7, 0)
        old = "triton kernels need compute capability 7.5, this GPU has 7.0"
        assert set(reasons(dtype).values()) == {old}
        gpu_of(8, 0)
        assert set(reasons(dtype).values()) == {None}
    gpu_of(7, 5)
    for dtype in dtypes[:2]:
        assert set(reasons(dtype).values()) == {None}
    found = reasons(torch.bfloat16)
    assert "bfloat16 need compute capability 8.0, this GPU has 7.5: load the model with" in (
        found.pop("nf4_linear") or ""
    )
    assert set(found.values()) == {None}


def test_triton_declines_bfloat16_on_a_t4_by_name(gpu_of: Callable[[int, int], None]) -> None:
    """The op, the dtype, what the GPU has, and what to do: of every op that multiplies."""
    pytest.importorskip("triton")
    gpu_of(7, 5)
    with FakeTensorMode():
        x, w = (torch.empty(64, 64, device="cuda:0", dtype=torch.bfloat16) for _ in range(2))
        a, b = torch.empty(8, 64, device="cuda:0"), torch.empty(64, 8, device="cuda:0")
        adapter = Adapter(a, b, torch.tensor(1.0), 0.0, None)
    operands = {"weight": w, "adapter": adapter, "bias": None}
    for op in ("lora_linear", "lora_linear_backward"):
        with (
            lora_ops.use_backend("triton"),
            pytest.raises(BackendError, match=rf"{op}: .*bfloat16 .* 8\.0, this GPU has 7\.5: load .*float16"),
        ):
            OPS[op].choose(x, operands)
        assert OPS[op].choose(x.half(), operands)[0] == "triton"
