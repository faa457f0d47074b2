"""Round to nearest with the best of four scales a block: quick, from the weights alone.

A symmetric grid of equal steps g_0 < ... < g_max may clip nothing, or half a step, which is what rounding may lose
anyway; and two's complement reaches one step further below zero than above, so a block may turn its grid round with a
negative scale (as ggml's Q4_0 does):

    scale = max(min(w) / g_0, max(w) / g_max)                       round to nearest
    scale = max(min(w) / (g_0 - 1/2), max(w) / (g_max + 1/2))       clips at most half a step
    both of -w, with their sign turned                              blocks only: a scale a channel stays positive

The one with the least squared error, in this order where that is the same: weights that lie on a grid stay as they are.
Other data types, and scales that are codes, are rounded to nearest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import rtn
from kbitc.passes.solvers._blocks import (
    joined,
    nearest,
    signed_scales,
    squared_error,
    start_fit,
    store,
    to_blocks,
)
from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme, ScaleCode
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]
HALF = np.float32(0.5)


def solve(weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; only a learned table looks at them.
    """
    first = rtn.solve(weight, scheme, inputs)
    data_type = first.format
    if not data_type.uniform or data_type.asymmetric or scheme.bits == 1 or scheme.scale_code is not ScaleCode.PLAIN:
        return first
    blocks, best = to_blocks(weight, scheme), start_fit(first)
    there = to_blocks(np.ones_like(weight), scheme)  # 0 where a block has ended
    best.error = squared_error(blocks, there, best.affine.values(data_type.grid.astype(np.float32)[best.codes]))
    for scales in other_scales(blocks, data_type, scheme):
        best.take(nearest(blocks, there, best.affine._replace(scales=scales), data_type))
    return joined(first, [best])


def other_scales(blocks: FloatArray, data_type: Format, scheme: QuantScheme) -> list[FloatArray]:
    """Those besides round to nearest's, f32 [blocks, 1] each, of weights f32 [blocks, L]."""
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    bottom, top = np.float32(data_type.levels[0]), np.float32(data_type.levels[-1])
    found = [np.maximum(low / (bottom - HALF), high / (top + HALF))]
    if signed_scales(data_type, scheme):
        found.append(-np.maximum(-high / bottom, -low / top))
        found.append(-np.maximum(-high / (bottom - HALF), -low / (top + HALF)))
    return [store(scales, scheme) for scales in found]
