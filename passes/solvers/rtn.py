"""Round to nearest with the smallest scale that clips nothing.

Per block with weights w and levels g_0 < ... < g_max (Jacob et al., arXiv 1712.05877, section 2.1):

    symmetric:   scale = max(min(w) / g_0, max(w) / g_max)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2^k - 1),  zero point = round(-min(w, 0) / scale)
    one bit:     scale = mean |w|  (least squares for a sign; XNOR-Net, arXiv 1603.05279, equation 6)

The scale is rounded to its storage type before the weights are divided by it, so the codes fit the stored scale.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.quant.format import Format
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleType
from kbitc.quant.tensor import QTensor, blocks_of, spread

FloatArray = npt.NDArray[np.float32]
# Smallest normal f16 and f32: a smaller scale would lose its precision when stored.
SMALLEST = {ScaleType.F16: np.float32(2.0**-14), ScaleType.F32: np.finfo(np.float32).tiny}
LARGEST_F16 = np.float32(65504.0)


def solve(weight: FloatArray, scheme: QuantScheme) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.

    Returns:
        The codes, with scales already rounded to the scheme's scale type.
    """
    data_type = scheme.data_type()
    low, high, magnitude = _block_ranges(weight, scheme)
    zero_points = None
    if data_type.asymmetric:
        scales = _store((high - low) / np.float32(2**scheme.bits - 1), scheme.scale_type)
        zero_points = np.clip(np.rint(-low / scales), 0, 2**scheme.bits - 1).astype(np.uint8)
    elif scheme.bits == 1:
        # A sign has no zero level: only a zero scale makes an all-zero block zero again.
        scales = np.where(magnitude > 0, _store(magnitude, scheme.scale_type), np.float32(0))
    else:
        scales = _store(_symmetric_scale(low, high, data_type), scheme.scale_type)
    divisor = np.where(scales > 0, scales, np.float32(1))
    ratio = weight / spread(divisor, _shape3(weight), scheme)
    if zero_points is not None:
        zeros = data_type.grid.astype(np.float32)[spread(zero_points, _shape3(weight), scheme)]
        ratio = ratio + zeros
    return QTensor(data_type.encode(np.asarray(ratio, np.float32)), scales, zero_points, data_type, scheme)


def _shape3(weight: FloatArray) -> tuple[int, int, int]:
    n, t, c = weight.shape
    return n, t, c


def _symmetric_scale(low: FloatArray, high: FloatArray, data_type: Format) -> FloatArray:
    below, above = low / np.float32(data_type.levels[0]), high / np.float32(data_type.levels[-1])
    return np.asarray(np.maximum(below, above), np.float32)


def _block_ranges(weight: FloatArray, scheme: QuantScheme) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Per scale: min(w, 0), max(w, 0) and mean |w|, f32 of the scales' shape."""
    if scheme.granularity is Granularity.BLOCK:
        n, t, c = weight.shape
        count = blocks_of(c, scheme)
        padded = np.zeros((n, t, count * scheme.block), np.float32)
        padded[:, :, :c] = weight
        split = padded.reshape(n, t, count, scheme.block)
        used = np.minimum(scheme.block, c - scheme.block * np.arange(count)).astype(np.float32)
        return split.min(axis=3), split.max(axis=3), np.abs(split).sum(axis=3, dtype=np.float32) / used
    axes = (0, 1, 2) if scheme.granularity is Granularity.TENSOR else (1, 2)
    low = np.minimum(weight.min(axis=axes, keepdims=True), np.float32(0))
    high = np.maximum(weight.max(axis=axes, keepdims=True), np.float32(0))
    return low, high, np.abs(weight).mean(axis=axes, keepdims=True, dtype=np.float32)


def _store(scales: FloatArray, scale_type: ScaleType) -> FloatArray:
    """Round to the storage type; an all-zero block gets 1: runtimes refuse a scale of 0."""
    filled = np.where(scales > 0, np.maximum(scales, SMALLEST[scale_type]), np.float32(1))
    if scale_type is ScaleType.F32:
        return np.asarray(filled, np.float32)
    return np.minimum(filled, LARGEST_F16).astype(np.float16).astype(np.float32)
