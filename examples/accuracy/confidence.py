"""95 % intervals: of a share, and of any statistic of samples or of the difference that two models make on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tasks import Array

QUANTILE = 1.959964  # of the standard normal distribution at 0.975
RESAMPLES, SEED = 1000, 0

Interval = tuple[float, float]


def wilson(right: int, count: int) -> Interval:
    """Interval of the share right / count (Wilson, JASA 22, 1927), in 0 to 1; it has a width at 0 and 1 too."""
    share, z2 = right / count, QUANTILE**2 / count
    middle = share + z2 / 2
    reach = QUANTILE * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, (middle - reach) / (1 + z2)), min(1.0, (middle + reach) / (1 + z2))


def bootstrap(statistic: Callable[..., float], *rows: Array) -> Interval:
    """Percentile interval (Efron 1979) of statistic(*rows) when the samples are drawn anew with replacement.

    rows: f64 [samples, terms] of one or more models on the same samples; a draw takes the same samples of each.
    """
    generator = np.random.default_rng(SEED)
    count = len(rows[0])
    draws = (generator.integers(0, count, count) for _ in range(RESAMPLES))
    values = [statistic(*(each[draw] for each in rows)) for draw in draws]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
