"""Means over seeds with bootstrap intervals, and differences paired by seed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
EXACT = 50_000  # resamples up to which all are enumerated
RESAMPLES = 20_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean of `n` seeds with its 95 % interval; NaN limits where n < 2 leaves none."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean and its percentile bootstrap interval, widened for the number of seeds.

    Plain percentile intervals of few values cover far less than 95 %: resampling sees the standard
    deviation too small by √((n−1)/n), and normal quantiles are not Student's. The levels are
    therefore Φ(∓√(n/(n−1))·t_{0.975, n−1}), the expanded percentile interval (Hesterberg 2014,
    arXiv 1411.5279). All n^n resamples are enumerated where that is cheap: the result
    is then exact, and for five seeds close to "every seed agrees". Otherwise a fixed seed draws.

    Args:
      values: one number a seed; NaN are left out.

    Returns:
      The interval; all NaN without values.
    """
    x = np.asarray([v for v in values if not math.isnan(v)], np.float64)
    n = len(x)
    if n < 2:
        mean = float(x[0]) if n else math.nan
        return Interval(mean, math.nan, math.nan, n)
    z = math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    level = 0.5 * math.erfc(z / math.sqrt(2))
    low, high = np.quantile(x[_resamples(n)].mean(axis=1), [level, 1 - level])
    return Interval(float(x.mean()), float(low), float(high), n)


@functools.cache
def _resamples(n: int) -> np.ndarray:
    """[resamples, n] indices: all, or as many as `RESAMPLES`."""
    if n**n <= EXACT:
        return np.array(list(itertools.product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(n, size=(RESAMPLES, n))


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Interval:
    """`bootstrap` of left − right over the seeds that both have."""
    return bootstrap([left[seed] - right[seed] for seed in left if seed in right])


def at_time(times: Sequence[float], values: Sequence[float], when: float) -> float:
    """A curve's value at a time, linear between evaluations; NaN outside it.

    Args:
      times: [E] increasing, seconds.
      values: [E]; NaN where nothing was measured, which is stepped over.
    """
    t, v = np.asarray(times, np.float64), np.asarray(values, np.float64)
    t, v = t[~np.isnan(v)], v[~np.isnan(v)]
    if not len(t) or not t[0] <= when <= t[-1]:
        return math.nan
    return float(np.interp(when, t, v))
