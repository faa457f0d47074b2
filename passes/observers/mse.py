"""The range with the least mean squared error of rounding and clipping (Banner et al., arXiv 1810.05723, section 3).

With step s = (high - low) / (levels - 1), a number inside costs s^2 / 12 and one outside costs its distance to the
range squared. The histogram gives the number of both; the two ends are searched in turn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.quant.stats import ValueStats

#: Ends that are tried: what was seen times 1, 0.98, ... down to 0.02.
FACTORS = np.linspace(1.0, 0.02, 50)
#: Each end is searched this often; the second turn sees the other end's choice.
TURNS = 3


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """The range of least expected squared error that holds zero."""
    lower, counts = stats.values.edges()
    if lower.size == 0:
        return 0.0, 0.0
    middles = np.clip(lower + stats.values.width / 2, stats.low, stats.high)
    weights = counts.astype(np.float64)
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    lows, highs = low * FACTORS if low < 0 else np.zeros(1), high * FACTORS if high > 0 else np.zeros(1)
    for _ in range(TURNS):
        low = float(lows[int(np.argmin([_error(middles, weights, item, high, levels) for item in lows]))])
        high = float(highs[int(np.argmin([_error(middles, weights, low, item, levels) for item in highs]))])
    return low, high


def _error(
    middles: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], low: float, high: float, levels: int
) -> float:
    """Expected squared error, times the number of numbers."""
    step = (high - low) / (levels - 1)
    below, above = np.minimum(middles - low, 0.0), np.maximum(middles - high, 0.0)
    outside = below + above
    inside = float(weights[outside == 0].sum())
    return inside * step * step / 12 + float((weights * outside * outside).sum())
