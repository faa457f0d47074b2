"""Quantiles of the weight itself: every level stands for equally many weights, so that no code is wasted.

Dettmers et al., arXiv 2110.02861, equation 5 (a data type of 2212.09720, section 2): with Q the quantile function of
the weights in units of their block's largest magnitude,

    level_i = (Q(i / 2^k) + Q((i + 1) / 2^k)) / 2,   i = 0 .. 2^k - 1

rounded half to even to the int8 grid of step 1/127. One table a tensor. It spreads codes evenly, which is not the
least squared error: outer levels are far apart. `kmeans` is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.errors import UsageError
from kbitc.quant.format import Format
from kbitc.quant.formats import nf

PEAK = 127
MAX_BITS = 7


def make(bits: int) -> Format:
    """The first guess: quantiles of a normal distribution.

    Raises:
        UsageError: for one bit, where a sign (``int1``) is the same thing, and for 8, where the grid has no room.
    """
    if not 2 <= bits <= MAX_BITS:
        remedy = "use int1" if bits == 1 else "use int8, whose levels are the whole grid"
        raise UsageError("a quantile table has 2 to 7 bits", got=f"quantile{bits}", remedy=remedy)
    return Format("quantile", bits, nf.make(bits).levels, uniform=False, learned=True, peak=PEAK)


def fit(bits: int, ratio: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None) -> Format:
    """The table of one weight.

    Args:
        bits: k.
        ratio: f32 of any shape, weights in units where the largest magnitude of a block is 127.
        importance: not used: every weight counts once, as in the paper.
    """
    bounds = np.quantile(ratio, np.linspace(0, 1, 2**bits + 1))
    levels = np.clip(np.rint((bounds[1:] + bounds[:-1]) / 2), -PEAK, PEAK)
    return Format("quantile", bits, tuple(int(x) for x in levels), uniform=False, learned=True, peak=PEAK)
