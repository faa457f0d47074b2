"""A range that covers whole tokens: all but few rows along the last axis lie inside completely.

Where outliers sit in the same channels of every token, as in transformers (Bondarenko et al., arXiv 2109.12948), a
share of all numbers says little: a percentile of 99.99 % may clip one number in every row. This one counts rows.
"""

from __future__ import annotations

from kbitc.quant.stats import ValueStats

#: Share of the rows that are inside at each end.
INSIDE = 0.999


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """The quantile 1 - INSIDE of the rows' smallest numbers and INSIDE of their largest, within what was seen."""
    low = stats.row_lows.quantile(1 - INSIDE) - stats.row_lows.width
    return max(low, stats.low), min(stats.row_highs.quantile(INSIDE), stats.high)
