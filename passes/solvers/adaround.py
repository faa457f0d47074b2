"""Learns for every weight whether to round it down or up, by gradient descent on the layer's error.

AdaRound (Nagel et al., arXiv 2004.10568): with v in the grid cell between the levels below and above a weight,

    value = scale * (below + h(v) (above - below) - zero) + offset
    h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)                                                         (23)
    minimise  tr((W - value) H (W - value)^T) + lambda sum (1 - |2 h(v) - 1|^beta)                         (21), (24)

H = E[x x^T] of the layer's inputs, so that no data are needed beside it; beta falls from 20 to 2 and drives h to 0 or
1. Adam (arXiv 1412.6980). Scales come from `mse_clip`. At the end h is rounded, and each output channel keeps the best
of this, `mse_clip` and round to nearest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import mse_clip, rtn
from kbitc.passes.solvers._blocks import Affine
from kbitc.passes.solvers.gptq import better_rows
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor, spread

FloatArray = npt.NDArray[np.float32]
#: Stretch of the sigmoid (section 3.3), weight and schedule of the regulariser, Adam's constants.
ZETA, GAMMA = 1.1, -0.1
LAMBDA, BETA_FROM, BETA_TO, WARM_UP = 1.0, 20.0, 2.0, 0.2
RATE, FIRST, SECOND, TINY = 0.1, 0.9, 0.999, 1e-8
ITERATIONS = 300


def solve(
    weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None, *, iterations: int = ITERATIONS
) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; without them this is `mse_clip`.
        iterations: steps of gradient descent.
    """
    start = mse_clip.solve(weight, scheme, inputs)
    if inputs is None:
        return start
    groups, shape = inputs.groups, start.shape
    grid = start.format.grid.astype(np.float32)
    affine = Affine.of(start).each(lambda array: np.broadcast_to(spread(array, shape, scheme), shape))
    ratio = affine.ratio(weight)
    below = np.clip(np.searchsorted(grid, ratio, side="right") - 1, 0, len(grid) - 2).astype(np.uint8)
    low, gap = grid[below], grid[below + 1] - grid[below]
    share = np.clip((ratio - low) / np.where(gap > 0, gap, 1), 0, 1)

    def grouped(array: npt.NDArray[Any]) -> FloatArray:
        return np.asarray(array.reshape(groups, shape[0] // groups, -1), np.float32)

    up = _learn(
        grouped(weight - affine.values(low)),
        grouped(affine.scales * gap),
        grouped(share),
        inputs.shrunk().second,
        iterations,
    )
    found = replace(start, codes=(below + up.reshape(shape)).astype(np.uint8))
    return better_rows(weight, inputs, better_rows(weight, inputs, rtn.solve(weight, scheme, inputs), start), found)


def _learn(
    rest: FloatArray, width: FloatArray, share: FloatArray, second: FloatArray, iterations: int
) -> npt.NDArray[np.bool_]:
    """Which weights to round up.

    Args:
        rest: f32 [G, n, K], weight minus its lower value.
        width: f32 [G, n, K], upper minus lower value, of either sign.
        share: f32 [G, n, K] in 0..1, where the weight lies between them: the start of h.
        second: f32 [G, K, K].
        iterations: steps.
    """
    v = -np.log((ZETA - GAMMA) / (share - GAMMA) - 1)
    v = np.asarray(v, np.float32)
    # In units of the error that rounding everything at random would make, so that lambda means the same everywhere.
    power = np.diagonal(second, axis1=1, axis2=2)[:, None, :]
    unit = np.maximum((width * width * power).mean(axis=2, keepdims=True), np.finfo(np.float32).tiny)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    for step in range(1, iterations + 1):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(sigmoid * np.float32(ZETA - GAMMA) + np.float32(GAMMA), 0, 1)
        gradient = -2 * width * ((rest - h * width) @ second) / unit
        gradient += _pull(h, step / iterations)
        gradient *= np.float32(ZETA - GAMMA) * sigmoid * (1 - sigmoid)
        mean = FIRST * mean + (1 - FIRST) * gradient
        square = SECOND * square + (1 - SECOND) * gradient * gradient
        change = mean / (1 - FIRST**step) / (np.sqrt(square / (1 - SECOND**step)) + TINY)
        v = np.asarray(v - RATE * change, np.float32)
    return np.asarray(v >= 0)


def _pull(h: FloatArray, progress: float) -> FloatArray:
    """Gradient of lambda (1 - |2 h - 1|^beta) by h; nothing while the layer's error settles."""
    if progress < WARM_UP:
        return np.zeros_like(h)
    done = (progress - WARM_UP) / (1 - WARM_UP)
    beta = BETA_TO + 0.5 * (BETA_FROM - BETA_TO) * (1 + np.cos(done * np.pi))
    centred = 2 * h - 1
    return np.asarray(-2 * LAMBDA * beta * np.sign(centred) * np.abs(centred) ** (beta - 1), np.float32)
