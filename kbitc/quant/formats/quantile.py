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

from kbitc.quant.format import Format
from kbitc.quant.formats._learned import PEAK, first_guess, learned


def make(bits: int) -> Format:
    """The first guess, k = 2..7; see `first_guess`."""
    return first_guess("quantile", bits)


def fit(bits: int, ratio: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None) -> Format:
    """The table of one weight.

    Args:
        bits: k.
        ratio: f32 of any shape, weights in units where the largest magnitude of a block is 127.
        importance: not used: every weight counts once, as in the paper.
    """
    bounds = np.quantile(ratio, np.linspace(0, 1, 2**bits + 1))
    levels = np.clip(np.rint((bounds[1:] + bounds[:-1]) / 2), -PEAK, PEAK)
    return learned("quantile", bits, [int(level) for level in levels])
