"""Means, spreads and bootstrap intervals against hand-made numbers and a count of all resamples in plain Python."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from distill_study.statistics import interval, paired, summarise


def by_counting(values: list[int], level: Fraction) -> tuple[Fraction, Fraction]:
    """The interval from the exact distribution of the resampled mean: multisets with their multinomial weights."""
    n = len(values)
    weights: Counter[Fraction] = Counter()
    for picks in itertools.combinations_with_replacement(range(n), n):
        ways = math.factorial(n)
        for times in Counter(picks).values():
            ways //= math.factorial(times)
        weights[Fraction(sum(values[i] for i in picks), n)] += ways
    total = n**n
    ends = []
    for p in ((1 - level) / 2, (1 + level) / 2):
        below = 0
        for mean in sorted(weights):
            below += weights[mean]
            if Fraction(below, total) >= p:
                ends.append(mean)
                break
    return ends[0], ends[1]


def test_mean_and_sample_standard_deviation() -> None:
    found = summarise([1.0, 2.0, 6.0])
    assert found is not None
    # deviations -2, -1, 3: (4 + 1 + 9) / (3 - 1) = 7
    assert (found.n, found.mean, found.std) == (3, 3.0, pytest.approx(math.sqrt(7)))
    one = summarise([5.0])
    assert one is not None
    assert (one.n, one.mean, one.std) == (1, 5.0, None)
    assert summarise([]) is None


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_the_interval_counts_all_resamples(n: int) -> None:
    """Catches a sample standard error, a quantile between values, and a resample size other than n."""
    rng = np.random.default_rng(n)
    for _ in range(5):
        values = [int(value) for value in rng.integers(-50, 50, n)]
        low, high = by_counting(values, Fraction(95, 100))
        assert interval([float(v) for v in values]) == (pytest.approx(float(low)), pytest.approx(float(high)))


def test_with_three_values_the_interval_is_their_range() -> None:
    assert interval([2.0, -1.0, 0.5]) == (-1.0, 2.0)
    assert interval([2.0, -1.0, 0.5], level=0.9) != (-1.0, 2.0)


def test_many_values_are_sampled_near_the_exact_interval_and_always_alike() -> None:
    values = [3, -8, 15, 22, 4, 0, -11, 9]
    low, high = by_counting(values, Fraction(95, 100))
    found = interval([float(v) for v in values])
    assert found == interval([float(v) for v in values])
    assert found is not None
    assert found[0] == pytest.approx(float(low), abs=0.4)
    assert found[1] == pytest.approx(float(high), abs=0.4)


def test_one_value_has_no_interval() -> None:
    assert interval([1.0]) is None


def test_differences_are_paired_by_seed() -> None:
    """Catches pairing by position: the seeds come in other orders, and each side lacks one."""
    found = paired({2: 12.0, 0: 10.0, 1: 17.0}, {0: 9.0, 3: 100.0, 1: 18.0, 2: 7.0})
    assert found is not None
    # seed 0: +1, seed 1: -1, seed 2: +5
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(5 / 3)
    assert (found.low, found.high, found.above) == (-1.0, 5.0, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None
    alone = paired({0: 1.0}, {0: 3.0})
    assert alone is not None
    assert (alone.mean, alone.low, alone.high, alone.above) == (-2.0, None, None, 0)
