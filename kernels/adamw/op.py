"""AdamW's update of many tensors: schema, shape rule and the public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ops.kernels.adamw.operands import Slices
from lora_ops.runtime.checks import check_dtype
from lora_ops.runtime.dispatch import Op

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE = 256  # elements of an 8-bit state that share one absmax

_adamw = Op(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] absmaxes, Tensor constants, Tensor index, int? seed) -> ()",
    __package__,
)


@_adamw.kernel
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    absmaxes: list[Tensor], constants: Tensor, index: Tensor, seed: int | None,
) -> None:  # fmt: skip
    slices = Slices(params, grads, exp_avgs, exp_avg_sqs, absmaxes, constants, index, seed)
    _adamw.run(params[0], slices=slices)


@_adamw.fake
def _(*operands: Any) -> None:
    return None


@dataclass(slots=True)
class Slice:
    """A run of elements of one parameter with its states, all contiguous, of n elements and on one device.

    Attributes:
        param: float32, bfloat16 or float16.
        grad: the same shape, float32, bfloat16 or float16.
        exp_avg, exp_avg_sq: float32, or uint8 codes of `quantize_blockwise8` (signed; unsigned) in blocks of 256.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(n / 256)] with codes, else None.
        row: row of `constants` that holds for it.
        stream, step, first: number of the parameter, its step, and the element that the slice begins at: what
            stochastic rounding draws its bits from. With 8-bit states `first` is a multiple of 256.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    row: int = 0
    stream: int = 0
    step: int = 1
    first: int = 0


def constants(
    step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, maximize: bool = False
) -> tuple[float, ...]:
    """The numbers of one step that all elements share, rounded to float32 by whoever stores them: a row of `constants`.

    1 − lr · λ, 1 − β₁, β₂, 1 − β₂, ε, lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), sign of the gradient.
    """
    beta1, beta2 = betas
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    sign = -1.0 if maximize else 1.0
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr / bias1, 1 / math.sqrt(bias2), sign


def adamw_(slices: Sequence[Slice], rows: Sequence[tuple[float, ...]], *, seed: int | None = None) -> None:
    """One AdamW step of many slices in place, in one kernel call.

    g ← sign · g;  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²;
    p ← p · (1 − lr · λ) − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε),

    in float32, rounded to the parameter's dtype once. 8-bit states are decoded, updated and coded to the exactly
    nearest code; the update of p uses m and v before they are coded. An inf or NaN makes its whole block NaN.

    Args:
        slices: what to update. rows: from `constants`, one for each combination of group and step.
        seed: bfloat16 parameters are rounded stochastically with the bits of this seed; None: to nearest even.

    Raises:
        ValueError: if a slice's tensors do not fit each other.

    Source: Decoupled Weight Decay Regularization (Loshchilov and Hutter 2019), algorithm 2; 8-bit Optimizers via
    Block-wise Quantization (Dettmers et al. 2022), section 2.
    """
    if not slices:
        return
    absmaxes: list[Tensor] = []
    for i, s in enumerate(slices):
        try:
            absmaxes += _check(s, len(rows))
        except ValueError as error:  # noqa: PERF203
            raise ValueError(f"slice {i}: {error}") from None
    index = torch.tensor([number for s in slices for number in (s.row, s.stream, s.step, s.first)]).view(-1, 4)
    torch.ops.lora_ops.adamw_(
        [s.param for s in slices], [s.grad for s in slices], [s.exp_avg for s in slices],
        [s.exp_avg_sq for s in slices], absmaxes, torch.tensor(rows, dtype=torch.float32), index, seed,
    )  # fmt: skip


def _check(s: Slice, rows: int) -> tuple[Tensor, ...]:
    """The absmax tensors of a slice that fits together; cheap, because it runs for every slice of every step."""
    n = s.param.numel()
    coded = s.exp_avg.dtype == torch.uint8
    state_dtype = torch.uint8 if coded else torch.float32
    if s.param.dtype not in FLOAT_DTYPES or s.grad.dtype not in FLOAT_DTYPES:
        check_dtype("param", s.param, FLOAT_DTYPES)
        check_dtype("grad", s.grad, FLOAT_DTYPES)
    if s.exp_avg.dtype != state_dtype or s.exp_avg_sq.dtype != state_dtype:
        check_dtype("exp_avg", s.exp_avg, (state_dtype,))
        check_dtype("exp_avg_sq", s.exp_avg_sq, (state_dtype,))
    named = {"param": s.param, "grad": s.grad, "exp_avg": s.exp_avg, "exp_avg_sq": s.exp_avg_sq}
    for name, t in named.items():
        if t.numel() != n:
            raise ValueError(f"{name}: expected {n} elements, got {t.numel()}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")
    if not 0 <= s.row < rows:
        raise ValueError(f"row: expected one of {rows}, got {s.row}")
    if s.first % BLOCK_SIZE:
        raise ValueError(f"first: expected a multiple of {BLOCK_SIZE}, got {s.first}")
    if not coded:
        return ()
    blocks = -(-n // BLOCK_SIZE)
    for name, absmax in (("exp_avg_absmax", s.exp_avg_absmax), ("exp_avg_sq_absmax", s.exp_avg_sq_absmax)):
        if absmax is None:
            raise ValueError(f"{name}: expected a tensor with 8-bit codes, got None")
        if absmax.numel() != blocks or absmax.dtype != torch.float32:
            check_dtype(name, absmax, (torch.float32,))
            raise ValueError(f"{name}: expected {blocks} elements, got {absmax.numel()}")
    return s.exp_avg_absmax, s.exp_avg_sq_absmax  # type: ignore[return-value]
