"""The mean range of a batch.

A moving average m <- m + c (x_batch - m) (Jacob et al., arXiv 1712.05877, section 3.1) estimates the mean of the
batches' extremes and depends on their order; this is the mean itself.
"""

from __future__ import annotations

from kbitc.quant.stats import ValueStats


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """Mean over the batches of (smallest, largest) number."""
    return stats.batch_mean()
