"""Statistics over seeds: mean, spread, and paired differences with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
EXACT = 6
"""Up to this many seeds all n^n resamples are used; above, `DRAWS` random ones."""
DRAWS = 20_000


@dataclass(frozen=True)
class Summary:
    """`std` is the sample standard deviation (n - 1), None for one value."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Over pairs of the same seed: the mean of variant - base, its interval (None for one pair), pairs above 0."""

    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    above: int


def summarise(values: Sequence[float]) -> Summary | None:
    """None where there is no value."""
    if not values:
        return None
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13); None for fewer than 2 values.

    The ends are values that the resampled mean takes: the smallest whose distribution function reaches
    (1 - level) / 2 and (1 + level) / 2. Deterministic. With three values it is their whole range.
    """
    n = len(values)
    if n < 2:
        return None
    if n <= EXACT:
        indices = np.indices((n,) * n).reshape(n, -1)
    else:
        indices = np.random.default_rng(0).integers(0, n, (n, DRAWS))
    means = np.asarray(values, dtype=float)[indices].mean(axis=0)
    # rounding must not separate resamples that are the same multiset in a different order
    low, high = np.quantile(np.round(means, 12), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """values and base by seed -> the difference over the seeds that both have; None without any."""
    seeds = tuple(sorted(values.keys() & base.keys()))
    if not seeds:
        return None
    differences = [values[seed] - base[seed] for seed in seeds]
    low, high = interval(differences) or (None, None)
    return Difference(seeds, float(np.mean(differences)), low, high, sum(d > 0 for d in differences))
