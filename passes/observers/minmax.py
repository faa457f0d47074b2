"""The range of everything seen: nothing is clipped (Jacob et al., arXiv 1712.05877, section 3)."""

from __future__ import annotations

from kbitc.quant.stats import ValueStats


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """(smallest, largest) number."""
    return stats.low, stats.high
