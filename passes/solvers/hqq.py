"""Scale and zero point by half-quadratic splitting: a fit that outliers do not pull, from the weights alone.

Minimises sum |w - value|^p with p < 1 over scale and zero point of each block (Badri and Shaji, "Half-Quadratic
Quantization of Large Machine Learning Models", Mobius Labs 2023). With an outlier term e beside the values, in turn:

    e <- shrink(w - value) = sign(r) max(|r| - |r|^(p-1) / beta, 0),  r = w - value       (their equation for W_e)
    scale, zero point <- least squares for w - e;  codes <- nearest;  beta <- kappa beta

They fit the zero point alone, as a real number. Here it is a code, so the scale is fitted too, and it is all there is
to fit where the data type is symmetric. Each block keeps the best it has seen, round to nearest included.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import rtn
from kbitc.passes.solvers._blocks import (
    CHUNK,
    Fit,
    encode,
    from_blocks,
    least_squares,
    rebuilt,
    searchable,
    start_fit,
    to_blocks,
    trials,
)
from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]
#: The norm, the weight of the splitting and its growth, rounds (the authors' choices).
P, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20
#: Shares of the full range from which the iteration starts; the authors start at the full range.
STARTS = tuple(np.float32(share) for share in (1.0, 0.85, 0.7))


def solve(weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; only a learned table looks at them.
    """
    first = rtn.solve(weight, scheme, inputs)
    if not searchable(scheme):
        return first
    blocks, begin = to_blocks(weight, scheme), start_fit(first)
    there = to_blocks(np.ones_like(weight), scheme)
    size = max(1, CHUNK // blocks.shape[1])
    fits = []
    for start in range(0, len(blocks), size):
        part = slice(start, start + size)
        known = Fit(begin.scales[part], begin.zeros[part], begin.codes[part], begin.error[part])
        fits.append(_fit(blocks[part], there[part], known, first.format, scheme))
    return rebuilt(
        first,
        from_blocks(np.concatenate([fit.codes for fit in fits]), first.shape, scheme),
        np.concatenate([fit.scales for fit in fits]),
        np.concatenate([fit.zeros for fit in fits]),
    )


def norm(rest: FloatArray) -> FloatArray:
    """sum |r|^p along the last axis, kept."""
    return np.asarray((np.abs(rest) ** np.float32(P)).sum(axis=-1, keepdims=True), np.float32)


def shrink(rest: FloatArray, beta: float) -> FloatArray:
    """The outlier term that minimises |e|^p + beta / 2 (e - r)^2, in the authors' closed approximation."""
    size = np.abs(rest)
    threshold = np.where(size > 0, size, 1) ** np.float32(P - 1) / np.float32(beta)
    return np.asarray(np.sign(rest) * np.maximum(size - threshold, 0), np.float32)


def _fit(weight: FloatArray, there: FloatArray, known: Fit, data_type: Format, scheme: QuantScheme) -> Fit:
    """The best of some rounds from some starts; weight f32 [blocks, L], there: 1, or 0 where a block has ended."""
    grid = data_type.grid.astype(np.float32)
    best = known
    best.error = norm(there * (weight - best.scales * (grid[best.codes] - best.zeros)))
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    # The splitting is stated for weights whose rest is about 1: a unit of each block makes it so.
    unit = np.maximum(np.abs(weight).max(1, keepdims=True), np.finfo(np.float32).tiny)
    for share in STARTS:
        for scales, zeros in trials(share * low, share * high, data_type, scheme):
            beta = BETA
            for _ in range(ROUNDS):
                codes = encode(weight, scales, zeros, data_type)
                rest = there * (weight - scales * (grid[codes] - zeros))
                best.take(Fit(scales, zeros, codes, norm(rest)))
                target = weight - unit * shrink(rest / unit, beta)
                zeros = _zero(target, there, scales, grid[codes], zeros, data_type)
                scales = least_squares(target, there, grid[codes] - zeros, scales, scheme)
                beta *= KAPPA
    return best


def _zero(
    target: FloatArray,
    there: FloatArray,
    scales: FloatArray,
    levels: FloatArray,
    zeros: FloatArray,
    data_type: Format,
) -> FloatArray:
    """The level nearest to mean(level - target / scale): their equation for z, rounded to a code."""
    if not data_type.asymmetric:
        return zeros
    mean = (there * (levels - target / scales)).sum(axis=1, keepdims=True) / there.sum(axis=1, keepdims=True)
    return np.asarray(np.clip(np.rint(mean), data_type.levels[0], data_type.levels[-1]), np.float32)
