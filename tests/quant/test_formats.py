"""What every frozen format promises: equal values after saving, exact codes, products within the tolerance rule.

A toy format that is registered here runs through the same tests: a class is all that a format needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import lora_ops
from lora_ops.functional import lora_linear
from lora_ops.kernels.lora_linear import native_impl
from lora_ops.quant.frozen import FORMATS, FrozenTensor, Parts, operands, register
from tests.cases import LinearCase, assert_right, run_ours


@register
@dataclass(frozen=True)
class Toy(FrozenTensor):
    """8-bit integers with one float32 scale a row."""

    format: ClassVar[str] = "toy"
    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 0

    @property
    def parts(self) -> Parts:
        return self.codes, self.scales, None, None

    @classmethod
    def from_parts(cls, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, block_size: int) -> Toy:
        codes, scales, _, _ = parts
        assert scales is not None
        return cls(codes, scales, shape, dtype, block_size)

    @classmethod
    def encode(cls, w: Tensor) -> Toy:
        scales = w.float().abs().amax(1, keepdim=True) / 127
        return cls((w.float() / scales).round().to(torch.int8), scales, tuple(w.shape), w.dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales).to(dtype)

    def check(self, name: str) -> None:
        if self.codes.shape != self.shape:
            raise ValueError(f"{name}.codes: expected {self.shape}, got {tuple(self.codes.shape)}")

    def to_state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.codes, "weight.scales": self.scales, "weight.like": torch.empty(0, dtype=self.dtype)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Toy:
        codes = state["weight"]
        return cls(codes, state["weight.scales"], tuple(codes.shape), state["weight.like"].dtype)


@pytest.fixture(params=FORMATS)
def cls(request: pytest.FixtureRequest) -> type[FrozenTensor]:
    return FORMATS[request.param]


def weight(n: int = 48, k: int = 80, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def equal(a: FrozenTensor, b: FrozenTensor) -> bool:
    same = all(torch.equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))
    return same and (a.shape, a.dtype, a.block_size) == (b.shape, b.dtype, b.block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_read(cls: type[FrozenTensor], dtype: torch.dtype) -> None:
    q = cls.encode(weight(dtype=dtype))
    state = q.to_state_dict()
    assert equal(cls.from_state_dict({key: t.clone() for key, t in state.items()}), q)
    assert q.nbytes < weight().nbytes


def test_decoded_values_are_coded_exactly(cls: type[FrozenTensor]) -> None:
    q = cls.encode(weight())
    again = cls.encode(q.decode(torch.float32))
    assert torch.equal(again.parts[0], q.parts[0])
    assert torch.equal(again.decode(torch.float32), q.decode(torch.float32))
    assert (q.decode(torch.float32) - weight()).abs().max() < 0.3 * weight().abs().max()


def test_what_does_not_fit_is_refused(cls: type[FrozenTensor]) -> None:
    q = cls.encode(weight())
    broken = cls.from_parts(q.parts, (49, 80), q.dtype, q.block_size)
    with pytest.raises(ValueError, match=r"weight\."):
        lora_linear(torch.randn(3, 80), broken, torch.randn(2, 80), torch.randn(49, 2), scale=1.0)


def test_ops_take_it(cls: type[FrozenTensor]) -> None:
    """As op arguments and back, on another device, and through torch's own checks of an op."""
    q = cls.encode(weight())
    assert q.to("meta").device.type == "meta"
    x, a, b = torch.randn(5, 80), torch.randn(2, 80), torch.randn(48, 2)
    args = (x, None, a, b, torch.tensor(2.0), 0.0, None, *operands(q))
    torch.library.opcheck(torch.ops.lora_ops.lora_linear.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 130])
def test_products(cls: type[FrozenTensor], dtype: torch.dtype, m: int, backend: str) -> None:
    """y and every gradient against the dense weight that the codes stand for."""
    case = LinearCase(m=m, n=48, k=80, r=4, dtype=dtype, weight="dense", bias=True, dropout_p=0.1)
    dense = case.inputs()
    q = cls.encode(weight(dtype=dtype))
    over_dense = replace(dense, weight=q.decode(dtype))
    over_codes = replace(dense, weight=q)
    if backend == "native" and (reason := native_impl.declines("lora_linear", dense.x, weight=q)):
        assert reason == f"native kernels have no {cls.format} weights"
        with pytest.raises(lora_ops.BackendError, match=reason):
            run_ours(over_codes)
        return
    assert_right(over_dense, run_ours(over_codes))


def test_a_format_without_kernels_is_served_by_the_reference() -> None:
    x, a, b = torch.randn(5, 80), torch.randn(2, 80), torch.randn(48, 2)
    with lora_ops.trace() as trace:
        lora_linear(x, Toy.encode(weight()), a, b, scale=1.0)
    (call,) = trace.calls
    assert call.backend == "reference"
    assert "kernels have no toy weights" in call.reason or "native library" in call.reason


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="format: expected a name that is not taken, got 'toy'"):
        register(Toy)
