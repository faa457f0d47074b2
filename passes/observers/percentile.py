"""A range that leaves a fixed share of the numbers outside (Wu et al., arXiv 2004.09602, section 5.2)."""

from __future__ import annotations

from kbitc.quant.stats import ValueStats

#: Share of the numbers inside the range; what lies outside is split between both ends. 99.99 % is the value that
#: loses least over the networks of arXiv 2004.09602, table 5.
INSIDE = 0.9999


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """The quantiles at (1 - INSIDE) / 2 and (1 + INSIDE) / 2, to one bin, within what was seen."""
    outside = (1 - INSIDE) / 2
    low = stats.values.quantile(outside) - stats.values.width
    return max(low, stats.low), min(stats.values.quantile(1 - outside), stats.high)
