"""Of several ranges the one that disturbs the outputs of the model least, measured a value at a time on samples.

A few numbers far outside the rest can be noise, or what the network turns on: one channel of one token in the
feed-forward part of a transformer (Bondarenko et al., arXiv 2109.12948, section 3). Statistics of the value alone
cannot tell which; the outputs do. `passes/allocate/measured.py` runs the ranges that are offered here.
"""

from __future__ import annotations

import math

from kbitc.passes.observers import mse, percentile
from kbitc.quant.stats import ValueStats

#: A range is offered when an end of it differs from those before by more than this factor.
APART = 1.05
#: Ranges between the percentile and everything seen lie at most this factor apart.
STRIDE = 1.5


def observe(stats: ValueStats, levels: int) -> tuple[float, float]:
    """The range that is taken when nothing is measured: that of `percentile`."""
    return percentile.observe(stats, levels)


def candidates(stats: ValueStats, levels: int) -> list[tuple[float, float]]:
    """`percentile`'s range, steps from there to everything seen, and `mse`'s: each tells from those before it.

    Both ends take their steps together, each in equal ratios; an end stays where the data are of one sign.
    """
    start, whole = _with_zero(percentile.observe(stats, levels)), _with_zero((stats.low, stats.high))
    ratio = max((end / begin for begin, end in zip(start, whole, strict=True) if begin), default=1.0)
    count = math.ceil(math.log(ratio) / math.log(STRIDE)) if ratio > APART else 0
    steps = [_between(start, whole, step / count) for step in range(1, count + 1)]
    found = [start]
    for low, high in (*steps, _with_zero(mse.observe(stats, levels))):
        if not any(_alike(low, kept[0]) and _alike(high, kept[1]) for kept in found):
            found.append((low, high))
    return found


def _with_zero(ends: tuple[float, float]) -> tuple[float, float]:
    return min(ends[0], 0.0), max(ends[1], 0.0)


def _between(start: tuple[float, float], whole: tuple[float, float], share: float) -> tuple[float, float]:
    low, high = (
        begin * (end / begin) ** share if begin else end * share for begin, end in zip(start, whole, strict=True)
    )
    return low, high


def _alike(one: float, other: float) -> bool:
    smaller, larger = sorted((abs(one), abs(other)))
    return larger <= APART * smaller
