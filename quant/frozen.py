"""Frozen weights in fewer bits: what every format gives, and the table of formats.

A format is a folder beside this file with a `FrozenTensor` of its own, which `register` puts into the table. Ops take
it from then on wherever they take a frozen weight: with `decode` alone on the reference backend, and on another one as
soon as its kernels do not decline the format.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is of Python 3.11

# How a frozen weight stands in the signature of an op: the parts of a FrozenTensor, or with layout = "" a dense tensor
# in the place of the first one. `operands` writes them, `from_operands` reads them. layout is the format and the block
# size in one, such as "nf4:64": an argument more costs 4.5 µs in torch.library's autograd, forward and backward.
OPERANDS_SCHEMA = "Tensor data, Tensor? scales, Tensor? nested_scales, Tensor? offset, SymInt[] shape, str layout"
N_OPERANDS = 6
Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Sequence[int], str]


class FrozenTensor:
    """A frozen weight in a format of fewer bits; a format overrides what raises here.

    Not an abc.ABC: `isinstance` of one takes half a microsecond, several times a call.

    Attributes:
        format: the name of the format.
        shape: of the weight that was encoded.
        dtype: of the weight that was encoded, and the default of `dequantize`.
        block_size: elements that share a scale.
    """

    format: ClassVar[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int

    @property
    def parts(self) -> Parts:
        """The tensors that hold the value: its data, and up to three of scales."""
        raise NotImplementedError

    @classmethod
    def from_parts(cls, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, block_size: int) -> Self:
        """The tensor with these parts."""
        raise NotImplementedError

    @classmethod
    def encode(cls, w: Tensor) -> Self:
        """`w` in this format, with its usual options."""
        raise NotImplementedError

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values in plain PyTorch, rounded once to `dtype`: the meaning of the format."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Raise ValueError, naming the part of `name`, unless the parts fit each other."""
        raise NotImplementedError

    def to_state_dict(self) -> dict[str, Tensor]:
        """The tensors that a layer with this weight saves, by key."""
        raise NotImplementedError

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """What `to_state_dict` gave."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the dtype that was encoded or in another one."""
        return self.decode(dtype or self.dtype)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def tensors(self) -> tuple[Tensor, ...]:
        """The parts, without those that are absent."""
        return tuple(t for t in self.parts if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held: data and all scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same value with every tensor on `device`."""

        def move(t: Tensor | None) -> Any:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        data, *scales = self.parts
        parts = move(data), *(move(t) for t in scales)
        return self.from_parts(parts, self.shape, self.dtype, self.block_size)


_T = TypeVar("_T", bound=FrozenTensor)
FORMATS: dict[str, type[FrozenTensor]] = {}


def register(cls: type[_T]) -> type[_T]:
    """Put a format into the table; a decorator of its class."""
    if cls.format in FORMATS or not cls.format:
        raise ValueError(f"format: expected a name that is not taken, got {cls.format!r}")
    FORMATS[cls.format] = cls
    return cls


def operands(weight: Tensor | FrozenTensor) -> Operands:
    """The op arguments of OPERANDS_SCHEMA that stand for `weight`."""
    if isinstance(weight, FrozenTensor):
        return *weight.parts, weight.shape, f"{weight.format}:{weight.block_size}"
    return weight, None, None, None, weight.shape, ""


def from_operands(dtype: torch.dtype, *args: Any) -> Any:
    """The weight that the op arguments of OPERANDS_SCHEMA stand for; `dtype` becomes that of a FrozenTensor."""
    data, *scales, shape, layout = args
    if not layout:
        return data
    cls, block_size = _read_layout(layout)
    return cls.from_parts((data, *scales), tuple(shape), dtype, block_size)


@functools.cache
def _read_layout(layout: str) -> tuple[type[FrozenTensor], int]:
    name, _, block_size = layout.partition(":")
    return FORMATS[name], int(block_size)


def data_of(weight: Tensor | FrozenTensor) -> Tensor:
    """The tensor whose device is the weight's, and that a dense weight is."""
    return weight.parts[0] if isinstance(weight, FrozenTensor) else weight


def declines_format(weight: Tensor | FrozenTensor, *served: str, backend: str) -> str | None:
    """Why a backend's kernels cannot take the weight's format, or None; for an op's `declines`."""
    if isinstance(weight, FrozenTensor) and weight.format not in served:
        return f"{backend} kernels have no {weight.format} weights"
    return None
