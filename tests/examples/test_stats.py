"""The confidence interval: textbook quantiles, textbook intervals, and coverage on drawn data."""

from __future__ import annotations

import math
import random

import pytest

from examples.demo.stats import paired_interval, student_t


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 5, 2.5706), (0.975, 10, 2.2281), (0.95, 3, 2.3534),
     (0.975, 30, 2.0423), (0.975, 10_000, 1.9600), (0.025, 10, -2.2281)],
)  # fmt: skip
def test_student_t_is_the_table_in_books(probability, freedom, value):
    assert student_t(probability, freedom) == pytest.approx(value, abs=1e-4)


def test_ungrouped_interval_is_the_paired_t_interval():
    before, after = [3.0, 4.0, 5.0, 6.0], [2.0, 3.5, 3.0, 5.5]
    interval = paired_interval(before, after)
    mean, deviation = -1.0, math.sqrt((0 + 0.25 + 1 + 0.25) / 3)
    half = 3.1824 * deviation / 2
    assert interval.mean == mean
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=1e-4)
    assert not interval.excludes_zero


def test_a_clear_fall_excludes_zero():
    assert paired_interval([3.0, 3.1, 3.2, 3.3], [1.0, 1.2, 1.1, 1.4]).excludes_zero


def test_copies_in_a_group_do_not_narrow_the_interval():
    before, after, names = [3.0, 4.0, 5.0], [2.0, 3.5, 3.0], ["a", "b", "c"]
    once = paired_interval(before, after, groups=names)
    often = paired_interval(before * 50, after * 50, groups=names * 50)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (often.items, often.clusters) == (150, 3)
    assert paired_interval(before * 50, after * 50).low > once.low


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draw = random.Random(1)
    hits = 0
    for _ in range(400):
        differences, groups = [], []
        for group in range(15):
            shift = draw.gauss(0, 1)
            differences += [0.5 + shift + draw.gauss(0, 1) for _ in range(6)]
            groups += [group] * 6
        interval = paired_interval([0.0] * len(differences), differences, groups=groups)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.91 <= hits / 400 <= 0.99


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="after: expected 2 numbers"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="groups: expected 2 entries"):
        paired_interval([1.0, 2.0], [1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="at least two"):
        paired_interval([1.0, 2.0], [1.0, 2.0], groups=["a", "a"])
    with pytest.raises(ValueError, match="freedom"):
        student_t(0.9, 0)
    with pytest.raises(ValueError, match="probability"):
        student_t(1.0, 5)
