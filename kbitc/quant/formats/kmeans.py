"""k-means: the table with the least squared error of the weight, each weight counted by its importance.

Deep Compression (Han et al., arXiv 1510.00149, section 3) with the weighting of SqueezeLLM (Kim et al., arXiv
2306.07629, equation 4): minimise over tables g of 2^k levels

    sum_j h_j * s_j^2 * min_i (r_j - g_i)^2        w_j = s_j * r_j,  s_j the scale of its block

with h_j = E[x_j^2] where there are calibration data, else 1. In one dimension, with levels on the int8 grid, this has
an exact solution: the nearest-level boundaries of two neighbouring levels a < b is (a + b) / 2, so the error is a sum
over pairs of neighbours and dynamic programming over the 255 possible levels finds its minimum. No start, no random
numbers, no local minimum. One table a tensor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.quant.format import Format
from kbitc.quant.formats._learned import PEAK, first_guess, learned

CHUNK = 1 << 20

Float64Array = npt.NDArray[np.float64]


def make(bits: int) -> Format:
    """The first guess, k = 2..7; see `first_guess`."""
    return first_guess("kmeans", bits)


def fit(bits: int, ratio: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None) -> Format:
    """The table of one weight.

    Args:
        bits: k.
        ratio: f32 of any shape, weights in units where the largest magnitude of a block is 127.
        importance: f32 of the same shape, what a squared error in these units counts, at least 0; None: 1 each.
    """
    levels = best_levels(_pair_costs(_moments(ratio, importance)), 2**bits)
    return learned("kmeans", bits, [index - PEAK for index in levels])


def _moments(ratio: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None) -> Float64Array:
    """Cumulative sums of h, h r and h r^2 over half-steps of the grid: f64 [3, 4 * 127 + 1].

    Entry i covers the weights below -127 + i / 2; the first is 0, and the last covers all of them.
    """
    cells = 4 * PEAK
    sums = np.zeros((3, cells))
    flat = ratio.reshape(-1)
    weights = None if importance is None else np.broadcast_to(importance, ratio.shape).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float64)
        h = np.ones_like(part) if weights is None else weights[start : start + CHUNK].astype(np.float64)
        cell = np.clip(np.floor(2 * (part + PEAK)), 0, cells - 1).astype(np.int64)
        for row, moment in enumerate((h, h * part, h * part * part)):
            sums[row] += np.bincount(cell, moment, cells)
    return np.concatenate([np.zeros((3, 1)), sums.cumsum(axis=1)], axis=1)


def _pair_costs(moments: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Squared errors by level index 0 .. 254 (level - 127).

    Returns:
        below [255], of all weights up to a lowest level; between [255, 255], of the weights from a level to the next,
        infinite unless the second is larger; above [255], of all weights from a highest level on.
    """
    place = np.arange(2 * PEAK + 1)
    level = (place - PEAK).astype(np.float64)

    def error(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64], center: Float64Array) -> Float64Array:
        h, first, second = moments[:, end] - moments[:, start]
        return np.asarray(second - 2 * center * first + center * center * h)

    left, right = place[:, None], place[None, :]
    middle = left + right  # in half-steps: (left + right) / 2 steps
    lower = error(np.broadcast_to(2 * left, middle.shape), middle, level[:, None])
    upper = error(middle, np.broadcast_to(2 * right, middle.shape), level[None, :])
    between = np.where(right > left, lower + upper, np.inf)
    everything = np.full_like(place, moments.shape[1] - 1)
    return error(np.zeros_like(place), 2 * place, level), between, error(2 * place, everything, level)


def best_levels(costs: tuple[Float64Array, Float64Array, Float64Array], count: int) -> list[int]:
    """Indices of the `count` ascending levels with the least total cost; the lowest ones among equal choices."""
    below, between, above = costs
    total, previous = below, []
    for _ in range(count - 1):
        sums = total[:, None] + between
        previous.append(sums.argmin(axis=0))
        total = sums.min(axis=0)
    chosen = [int((total + above).argmin())]
    for came_from in reversed(previous):
        chosen.append(int(came_from[chosen[-1]]))
    return chosen[::-1]
