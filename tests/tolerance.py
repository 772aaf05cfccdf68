"""The tolerance rule, in one place: ours may be at most 1.25 times as wrong as torch itself, measured against float64.

Three results of the same operands are compared:

- `truth`, float64 on the exact operands. For an NF4 weight, W = code · absmax in float64.
- `torch_own`, dense torch in the activations' dtype on operands rounded to it.
- `got`, ours.

The error of element i is counted in units of its *magnitude*, the root of the sum of the squares of the terms that it
sums (y[m, n] = Σ_k x[m, k] W[n, k]: magnitude² = Σ_k x² W²). Rounding errors of the terms add up to a random walk of
that size, whether or not the terms cancel, so a result near zero is not asked for more than arithmetic gives, and a row
of tiny values is held to its own scale. With e = |got - truth| / magnitude:

    RMS(e_got) <= 1.25 · RMS(e_own) + slack / √samples
    max(e_got) <= 1.25 · max(e_own) + slack              # one wrong element in a million does not show in an RMS
    slack      =  3 u + √terms · u_acc

u is the unit roundoff of the activations' dtype (half its eps: what one rounding to nearest costs at most) and u_acc
that of the accumulator. The slack is there because torch's error is itself one draw of rounding errors: on a single
element it may be zero by luck (or exactly, as in a sum of one term), while an honest result carries up to about three
roundings (an operand, an intermediate, the result) and the random walk of `terms` additions. Luck averages out, so the
slack of the RMS shrinks with the number of independent draws; `samples` is that number where it is smaller than the
number of elements (all N outputs of a token share the R roundings of S). In float64 truth is no better than `got`, and
torch's own error may be zero throughout; there slack is not divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 1.25


@dataclass(frozen=True)
class Truth:
    """A result in float64 and the magnitude of the terms that it sums, elementwise."""

    value: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Truth:
        """A result whose elements are not sums: each is its own magnitude."""
        value = value.double()
        return cls(value, value.abs())


@dataclass(frozen=True)
class Error:
    """Errors in units of the magnitude, of ours and of torch, and what the rule allows; `wrong` says why it fails."""

    rms: float
    maximum: float
    own_rms: float
    own_maximum: float
    limit_rms: float
    limit_maximum: float
    wrong: str | None

    @property
    def ratio(self) -> float:
        """RMS error over torch's own (1.0 if both are zero)."""
        if self.own_rms == 0:
            return 1.0 if self.rms == 0 else math.inf
        return self.rms / self.own_rms


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest in `dtype`."""
    return torch.finfo(dtype).eps / 2


def _relative(got: Tensor, truth: Truth, dtype: torch.dtype) -> Tensor:
    # Below the smallest normal number the spacing is constant: u · tiny is half of it.
    return (got.double() - truth.value).abs() / truth.magnitude.clamp_min(torch.finfo(dtype).tiny)


def _rms(e: Tensor) -> float:
    return float(e.square().mean().sqrt())


def compare(got: Tensor, torch_own: Tensor, truth: Truth, *, terms: int = 1, samples: int | None = None) -> Error:
    """Measure `got` by the rule above.

    Args:
        got: the result under test, any floating dtype.
        torch_own: dense torch's result; its dtype is the one whose roundings are allowed.
        truth: float64.
        terms: length of the longest sum.
        samples: independent roundings, if fewer than there are elements.
    """
    if got.shape != truth.value.shape or torch_own.shape != truth.value.shape:
        return _failed(
            f"shape {tuple(got.shape)}, expected {tuple(truth.value.shape)}, torch has {tuple(torch_own.shape)}"
        )
    if got.numel() == 0:
        return Error(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None)
    # Where torch overflows (float16), ours may.
    finite = torch.isfinite(torch_own)
    bad = ~torch.isfinite(got) & finite
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        return _failed(f"{int(bad.sum())} of {got.numel()} values are NaN or inf, the first at {first}")
    zero = truth.value.new_zeros(())
    e, own = (torch.where(finite, _relative(t, truth, torch_own.dtype), zero) for t in (got, torch_own))
    slack = 3 * unit_roundoff(torch_own.dtype) + math.sqrt(terms) * _accumulator_roundoff(torch_own.dtype)
    draws = 1 if torch_own.dtype == torch.float64 else min(samples or got.numel(), got.numel())
    limit_rms = RATIO * _rms(own) + slack / math.sqrt(draws)
    limit_max = RATIO * float(own.max()) + slack
    rms, maximum = _rms(e), float(e.max())
    wrong = None
    if rms > limit_rms:
        wrong = f"RMS error {rms:.3e} of the magnitude, allowed {limit_rms:.3e} (torch's own {_rms(own):.3e})"
    elif maximum > limit_max:
        at = tuple(int(i) for i in torch.unravel_index(e.argmax(), e.shape))
        own_max = float(own.max())
        wrong = (
            f"error {maximum:.3e} of the magnitude at {at}, allowed {limit_max:.3e} (torch's own {own_max:.3e}); "
            f"got {float(got[at]):.6g}, truth {float(truth.value[at]):.6g}"
        )
    return Error(rms, maximum, _rms(own), float(own.max()), limit_rms, limit_max, wrong)


def _accumulator_roundoff(dtype: torch.dtype) -> float:
    return unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)


def _failed(wrong: str) -> Error:
    return Error(math.inf, math.inf, 0.0, 0.0, 0.0, 0.0, wrong)


def assert_within(
    got: Tensor, torch_own: Tensor, truth: Truth, *, name: str, terms: int = 1, samples: int | None = None
) -> Error:
    """Raise AssertionError with the measured errors unless `got` keeps the rule; see `compare`."""
    error = compare(got, torch_own, truth, terms=terms, samples=samples)
    if error.wrong:
        raise AssertionError(f"{name}: {error.wrong}")
    return error
