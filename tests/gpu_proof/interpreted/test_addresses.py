"""Tensors of more than 2^31 elements: every address of every op's first, middle and last programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lora_ops.kernels.lora_linear import triton_impl as lora
from lora_ops.kernels.lora_linear.operands import Adapter, Needs
from lora_ops.quant.nf4.linear import triton_impl as nf4
from lora_ops.runtime.triton_launch import Launch
from tests.gpu_proof import registry
from tests.gpu_proof.expect import GateCase, meta_nf4
from tests.gpu_proof.gates import lora_linear
from tests.gpu_proof.interpreter import OutOfBounds, run_virtually

HUGE = [s for op in registry.ops() for s in registry.shipped_by(op) if s.case.huge]


@pytest.mark.parametrize("shipped", HUGE, ids=lambda s: s.id)
def test_addresses_of_huge_tensors(shipped: registry.Shipped) -> None:
    run_virtually(shipped.launch)


def test_some_op_is_checked() -> None:
    assert {s.op for s in HUGE} >= {"nf4_codec", "blockwise8"}


# Other tensors of these ops that may be huge. Their kernels' signatures are those of the gate's cases.


def _lora(m: int, n: int, k: int, r: int, *, kstep: bool = False) -> None:
    lora_linear.call(m, n, k, r, torch.bfloat16, 0.1, kstep=kstep, needs=Needs(True, True, True, True))


def _nf4(m: int, n: int, k: int, row_stride: int = 0) -> None:
    """Both directions; `row_stride` between tokens, as of a slice of something wide."""
    q = meta_nf4(n, k, nested=True)
    for width, transposed in ((k, True), (n, False)):
        strides = (row_stride or width, 1)
        nf4.matmul(
            torch.empty_strided((m, width), strides, dtype=torch.bfloat16, device="meta"), q, transposed=transposed
        )  # fmt: skip


LARGE: dict[str, dict[str, Callable[[], None]]] = {
    "lora_linear": {
        "W on the K-step route": lambda: _lora(64, 600_000, 8192, 16, kstep=True),
        "S": lambda: _lora(9_000_000, 512, 512, 256),
        "S on the K-step route": lambda: _lora(9_000_000, 512, 512, 256, kstep=True),
        "partial sums of T": lambda: _lora(600_000, 16384, 512, 32),
        "the largest lora_a": lambda: _lora(64, 512, 2**23, 256),
        "the largest lora_b": lambda: _lora(64, 2**23, 512, 256),
        "the largest lora_a on the K-step route": lambda: _lora(64, 512, 2**23, 256, kstep=True),
        "the largest lora_b on the K-step route": lambda: _lora(64, 2**23, 512, 256, kstep=True),
    },
    "nf4_linear": {
        "rows of x, GEMV": lambda: _nf4(4, 512, 512, 2**30),
        "rows of x, GEMM": lambda: _nf4(64, 512, 512, 2**26),
        "y": lambda: _nf4(256, 9_000_000, 64),
        "dX": lambda: _nf4(256, 64, 9_000_000),
    },
}


def large_launches(op: str, name: str) -> Iterator[Launch]:
    yield from (s.launch for s in registry.launches_of(op, GateCase(name, LARGE[op][name])))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, cases in LARGE.items() for name in cases])
def test_addresses_of_large_operands(op: str, name: str) -> None:
    for launch in large_launches(op, name):
        run_virtually(launch)


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_larger_adapters_are_declined(name: str) -> None:
    """By name, and not below the size where the kernels' 32-bit offsets overflow."""
    r, most = 256, 2**23
    n, k = (512, most + 128) if name == "lora_a" else (most + 128, 512)
    launches = [s.launch for s in registry.launches_of("lora_linear", GateCase(name, lambda: _lora(64, n, k, r)))]
    forward, backward = (launch for launch in launches if launch.kernel.__name__ == "_expand_kernel")
    with pytest.raises(OutOfBounds):
        run_virtually(backward if name == "lora_a" else forward)

    x, dy, w, a, b = (torch.empty(*shape, device="meta") for shape in ((64, k), (64, n), (n, k), (r, k), (n, r)))
    shape = (r, k) if name == "lora_a" else (n, r)
    reason = f"{name}: lora_linear's Triton kernels take up to 2^31 elements, not {shape}"
    large, small = (Adapter(*matrices, torch.tensor(2.0)) for matrices in ((a, b), (a[:, :most], b[:most])))
    assert lora.declines("lora_linear", x, x=x, weight=w, adapter=large, bias=None) == reason
    assert lora.declines("lora_linear_backward", dy, dy=dy, x=x, s=None, weight=w, adapter=large) == reason
    assert lora.declines("lora_linear", x, x=x, weight=w, adapter=small, bias=None) != reason
