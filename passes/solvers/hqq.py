"""Scale and zero point by half-quadratic splitting: a fit that outliers do not pull, from the weights alone.

Minimises sum |w - value|^p with p < 1 over scale and zero point of each block (Badri and Shaji, "Half-Quadratic
Quantization of Large Machine Learning Models", Mobius Labs 2023). With an outlier term e beside the values, in turn:

    e <- shrink(w - value) = sign(r) max(|r| - |r|^(p-1) / beta, 0),  r = w - value       (their equation for W_e)
    scale, zero point <- least squares for w - e;  codes <- nearest;  beta <- kappa beta

They fit the zero point z alone, as a real number: that is a scheme with offsets, offset = -scale * z. Where it is a
code it moves in whole steps; so the scale is fitted too, and it is all there is to fit where the data type is
symmetric. Each block keeps the best it has seen, round to nearest included.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import rtn
from kbitc.passes.solvers._blocks import (
    CHUNK,
    Affine,
    Fit,
    encode,
    extent,
    joined,
    least_squares,
    start_fit,
    to_blocks,
    trials,
)
from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scales import round_offsets
from kbitc.quant.scheme import QuantScheme, ScaleCode
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
    if scheme.scale_code is not ScaleCode.PLAIN:
        return first
    blocks, there = to_blocks(weight, scheme, "edge"), to_blocks(np.ones_like(weight), scheme)
    parts = start_fit(first).parts(max(1, CHUNK // blocks.shape[1]))
    return joined(first, [_fit(blocks[part], there[part], known, first.format, scheme) for part, known in parts])


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
    best.error = norm(there * (weight - best.affine.values(grid[best.codes])))
    # The splitting is stated for weights whose rest is about 1: a unit of each block makes it so.
    unit = np.maximum(np.abs(weight).max(1, keepdims=True), np.finfo(np.float32).tiny)
    for share in STARTS:
        for affine in trials(*extent(weight, scheme, share), data_type, scheme):
            beta = BETA
            for _ in range(ROUNDS):
                codes = encode(weight, affine, data_type)
                rest = there * (weight - affine.values(grid[codes]))
                best.take(Fit(affine, codes, norm(rest)))
                target = weight - unit * shrink(rest / unit, beta)
                affine = _moved(target, there, grid[codes], affine, data_type, scheme)
                scales = least_squares(affine.above(target), there, grid[codes] - affine.zeros, affine, scheme)
                affine = affine._replace(scales=scales)
                beta *= KAPPA
    return best


def _moved(
    target: FloatArray,
    there: FloatArray,
    levels: FloatArray,
    affine: Affine,
    data_type: Format,
    scheme: QuantScheme,
) -> Affine:
    """Their equation for z, mean(level - target / scale): as an offset, or as the nearest level."""
    if not data_type.asymmetric:
        return affine
    count = there.sum(axis=1, keepdims=True)
    if scheme.offset:
        mean = (there * (target - affine.scales * (levels - affine.zeros))).sum(axis=1, keepdims=True) / count
        return affine._replace(offsets=round_offsets(mean, scheme.scale_type))
    mean = (there * (levels - target / affine.scales)).sum(axis=1, keepdims=True) / count
    zeros = np.asarray(np.clip(np.rint(mean), data_type.levels[0], data_type.levels[-1]), np.float32)
    return affine._replace(zeros=zeros)
