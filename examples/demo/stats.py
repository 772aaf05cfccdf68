"""How sure a difference is: mean of paired differences with a 95 % confidence interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class PairedInterval:
    """The mean difference (after - before) and its confidence interval; `clusters` groups made the error bar."""

    mean: float
    low: float
    high: float
    items: int
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.low > 0 or self.high < 0


def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by bisection on its distribution function.

    Args:
        probability: between 0 and 1, as in 0.975.
        freedom: degrees of freedom, at least 1.

    Returns:
        The t with P(T ≤ t) = probability.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability: expected a number between 0 and 1, got {probability}")
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    if probability < 0.5:
        return -student_t(1 - probability, freedom)
    low, high = 0.0, 2.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) for t ≥ 0 by the finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    if freedom > 1000:
        return NormalDist().cdf(t)
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):  # cos + 2/3 cos³ + (2·4)/(3·5) cos⁵ + …
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        area = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, freedom - 1, 2):  # 1 + 1/2 cos² + (1·3)/(2·4) cos⁴ + …
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        area = sine * total
    return 0.5 + 0.5 * area


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> PairedInterval:
    r"""Mean of after - before with a confidence interval from Student's t distribution.

    With `groups` the error bar is cluster-robust: items of one group (one module, say) may be alike, so only the
    groups count as independent draws: se² = G/(G-1) · Σ_g (Σ_{i∈g} (d_i − d̄))² / n², with G - 1 degrees of
    freedom. Without groups each item is its own, and this is the ordinary paired t interval.

    Args:
        before: one number an item.
        after: as many, in the same order.
        groups: each item's group, or None.
        confidence: the interval's level.

    Returns:
        The interval.

    Raises:
        ValueError: if the lengths differ, or there are fewer than two groups.
    """
    count = len(before)
    if len(after) != count:
        raise ValueError(f"after: expected {count} numbers as in before, got {len(after)}")
    names: Sequence[Hashable] = range(count) if groups is None else groups
    if len(names) != count:
        raise ValueError(f"groups: expected {count} entries as in before, got {len(names)}")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    clusters = len(set(names))
    if clusters < 2:
        raise ValueError(f"groups: expected at least two to tell an error, got {clusters}")
    mean = math.fsum(differences) / count
    sums: dict[Hashable, float] = {}
    for name, difference in zip(names, differences, strict=True):
        sums[name] = sums.get(name, 0.0) + difference - mean
    error = math.sqrt(clusters / (clusters - 1) * math.fsum(s * s for s in sums.values())) / count
    half = student_t(0.5 + confidence / 2, clusters - 1) * error
    return PairedInterval(mean, mean - half, mean + half, count, clusters)
