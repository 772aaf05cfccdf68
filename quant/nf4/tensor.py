"""The NF4 format: the code book and the tensor that holds a quantized weight. Bytes are those of bitsandbytes.

Source: QLoRA (Dettmers et al. 2023), appendix E; layout as written by bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_ops.quant.frozen import FrozenTensor, Parts, register

# The one place where the code book stands: quantiles of N(0, 1) scaled to [-1, 1], exact in fp32.
NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # absmax values that share one fp32 absmax of their own when double-quantized


def nf4_code(device: torch.device | str | None = None) -> Tensor:
    """The 16 code values, fp32, ascending."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def nf4_thresholds(device: torch.device | str | None = None) -> Tensor:
    """The 15 decision thresholds: fp32 midpoints of neighbouring codes; a value equal to one takes the lower code."""
    code = nf4_code(device)
    return (code[:-1] + code[1:]) / 2


@register
@dataclass(frozen=True)
class NF4Tensor(FrozenTensor):
    """A tensor in NF4: value[e] = NF4_CODE[nibble e] · absmax[e // block_size], blocks flat over the row-major tensor.

    Attributes:
        packed: uint8 [(n + 1) // 2, 1], element 2i in the high nibble of byte i, element 2i + 1 in the low one.
        absmax: one value a block, [ceil(n / block_size)]: fp32, or the 8-bit codes (uint8) when double-quantized.
        shape: shape of the tensor that was quantized.
        dtype: dtype of the tensor that was quantized, and the default of `dequantize`.
        block_size: elements that share one absmax.
        nested_absmax: fp32 [ceil(n_blocks / 256)], or None when not double-quantized.
        nested_offset: fp32 0-d, the mean that was subtracted from absmax before its quantization, or None.
    """

    format: ClassVar[str] = "nf4"
    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether absmax is double-quantized."""
        return self.nested_absmax is not None

    @property
    def parts(self) -> Parts:
        """packed, absmax, nested_absmax, nested_offset."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    @classmethod
    def from_parts(cls, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, block_size: int) -> NF4Tensor:
        """See `parts`."""
        packed, absmax, nested_absmax, nested_offset = parts
        return cls(packed, absmax, shape, dtype, block_size, nested_absmax, nested_offset)  # type: ignore[arg-type]

    @classmethod
    def encode(cls, w: Tensor) -> NF4Tensor:
        """See `lora_ops.functional.quantize_nf4`."""
        # Here and below: the codec's files import this one.
        from lora_ops.quant.nf4.codec import quantize_nf4

        return quantize_nf4(w)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """See quant/nf4/codec/reference.py."""
        from lora_ops.quant.nf4.codec.reference import dequantize_nf4

        return dequantize_nf4(q=self, dtype=dtype)

    def check(self, name: str) -> None:
        """See `check_nf4`."""
        check_nf4(name, self)

    def to_state_dict(self) -> dict[str, Tensor]:
        """See state_dict.py."""
        from lora_ops.quant.nf4 import state_dict

        return state_dict.to_state_dict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> NF4Tensor:
        """See state_dict.py."""
        from lora_ops.quant.nf4 import state_dict

        return state_dict.from_state_dict(state)

    def numel(self) -> int:
        """Elements of the tensor that was quantized."""
        return math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `lora_ops.functional.dequantize_nf4`."""
        from lora_ops.quant.nf4.codec import dequantize_nf4

        return dequantize_nf4(self, dtype=dtype)


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")


def check_nf4(name: str, q: object, *, dim: int | None = None) -> None:
    """Raise unless `q` is an NF4Tensor whose parts fit each other (and has `dim` dimensions, if given)."""
    if not isinstance(q, NF4Tensor):
        raise TypeError(f"{name}: expected an NF4Tensor (see quantize_nf4), got {type(q).__name__}")
    check_block_size(q.block_size)
    if dim is not None and len(q.shape) != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got shape {tuple(q.shape)}")
    n = q.numel()
    n_blocks = -(-n // q.block_size)
    _check_part(name, "packed", q.packed, torch.uint8, ((n + 1) // 2, 1))
    if q.nested_absmax is None:
        _check_part(name, "absmax", q.absmax, torch.float32, (n_blocks,))
        return
    _check_part(name, "absmax", q.absmax, torch.uint8, (n_blocks,))
    _check_part(name, "nested_absmax", q.nested_absmax, torch.float32, (-(-n_blocks // NESTED_BLOCK_SIZE),))
    if q.nested_offset is None:
        raise ValueError(f"{name}.nested_offset: expected a 0-d float32 tensor, got None")
    _check_part(name, "nested_offset", q.nested_offset, torch.float32, ())


def _check_part(name: str, part: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or t.shape != shape:
        raise ValueError(f"{name}.{part}: expected {dtype} of shape {shape}, got {t.dtype} of shape {tuple(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{name}.{part}: expected a contiguous tensor, got strides {t.stride()}")
