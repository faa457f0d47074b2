"""The threshold whose quantized distribution is nearest in Kullback-Leibler divergence (Migacz, "8-bit inference with
TensorRT", GTC 2017).

The histogram of |x| is cut at bin i, what lies beyond is added to the last bin (P); the i bins are merged into
`levels / 2` groups and each group's count is spread over its bins that are not empty (Q). The i with the least
sum P log(P / Q) gives the threshold t, and the range is [-t, t] within what was seen. A value of one sign is
merged into `levels` groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.quant.stats import HALF, ValueStats

#: Bins of |x|, as TensorRT has.
BINS = 2048
#: Thresholds are tried every so many bins.
STRIDE = 8


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """(low, high) of the best threshold."""
    counts = stats.values.counts
    merged = (counts[HALF:] + counts[:HALF][::-1]).astype(np.float64)
    used = int(np.flatnonzero(merged)[-1]) + 1 if merged.any() else 0
    group = -(-used // BINS)
    if group == 0:
        return 0.0, 0.0
    padded = np.zeros(group * BINS)
    padded[:used] = merged[:used]
    density = padded.reshape(BINS, group).sum(axis=1)
    density[0] = density[1]  # an exact zero costs no code: TensorRT leaves the first bin out of the shape
    signed = stats.low < 0 < stats.high
    codes = max(2, levels // 2 if signed else levels)
    sizes = range(min(codes, BINS), BINS + 1, STRIDE)
    best = min(sizes, key=lambda size: _divergence(density, size, codes))
    threshold = best * group * stats.values.width
    return max(stats.low, -threshold), min(stats.high, threshold)


def _divergence(density: npt.NDArray[np.float64], size: int, codes: int) -> float:
    """Divergence of the distribution cut at `size` bins from itself in `codes` groups."""
    kept = density[:size]
    target = kept.copy()
    target[-1] += density[size:].sum()
    group = np.arange(size) * codes // size
    filled = kept > 0
    totals = np.bincount(group, kept, codes)
    places = np.bincount(group, filled, codes)
    model = np.where(filled, (totals / np.maximum(places, 1))[group], 0.0)
    if not model.any() or not target.any():
        return np.inf
    p, q = target / target.sum(), model / model.sum()
    both = (p > 0) & (q > 0)
    missing = p[(p > 0) & (q == 0)]
    floor = 1e-12  # a bin that the model leaves empty: finite, so that thresholds stay comparable
    return float((p[both] * np.log(p[both] / q[both])).sum() + (missing * np.log(missing / floor)).sum())
