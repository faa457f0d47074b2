"""How scales and offsets are stored: rounded to a float type, or as small codes of a coarser step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.quant.scheme import QuantScheme, ScaleCode, ScaleType

FloatArray = npt.NDArray[np.float32]
# Smallest normal f16 and f32: a smaller scale would lose its precision when stored.
SMALLEST = {ScaleType.F16: np.float32(2.0**-14), ScaleType.F32: np.finfo(np.float32).tiny}
LARGEST_F16 = np.float32(65504.0)
#: Scales that share a step with ScaleCode.DOUBLE.
GROUP = 256
# A step is rounded to so many significant bits that code * step is exact in the scale type, and for f32 also
# level * code * step in any order: 4-bit codes and 11 bits of f16; products of at most 127 and 24 bits of f32.
STEP_BITS = {ScaleType.F16: 7, ScaleType.F32: 16}
# f16 values are multiples of this.
SMALLEST_STEP = {ScaleType.F16: np.float32(2.0**-24), ScaleType.F32: np.finfo(np.float32).tiny}


def store_scales(scales: FloatArray, scheme: QuantScheme) -> tuple[FloatArray, FloatArray | None]:
    """Round scales to what the scheme can store.

    Args:
        scales: f32 [N, T, CB], [N, 1, 1] or [1, 1, 1], at least 0; 0 for an all-zero block.
        scheme: says how.

    Returns:
        The stored scales, f32 of the same shape, positive (a runtime may refuse a scale of 0); and the steps of coded
        scales, f32 [N] (integer) or [ceil(scales / 256)] (double), or None for plain ones.
    """
    if scheme.scale_code is ScaleCode.PLAIN:
        return round_scales(scales, scheme), None
    flat = _groups(scales, scheme.scale_code)
    steps = _steps(flat.max(axis=1), scheme)
    codes = np.clip(np.rint(flat / steps[:, None]), 1, largest_codes(steps, scheme)[:, None])
    stored = (codes * steps[:, None]).reshape(-1)[: scales.size].reshape(scales.shape)
    return np.asarray(stored, np.float32), steps


def largest_codes(steps: FloatArray, scheme: QuantScheme) -> FloatArray:
    """The largest code of scales with these steps, of their shape: what the scheme and its scale type hold."""
    most = np.full_like(steps, scheme.largest_scale_code)
    return np.minimum(most, np.floor(LARGEST_F16 / steps)) if scheme.scale_type is ScaleType.F16 else most


def round_scales(scales: FloatArray, scheme: QuantScheme) -> FloatArray:
    """Round to the storage type; an all-zero block gets 1: runtimes refuse a scale of 0.

    Beside offsets f32 scales are rounded to 16 significant bits: level * scale is then exact in float32, as it is for
    f16, so that adding the offset to it is one rounding on every machine, fused or not.
    """
    scale_type = scheme.scale_type
    filled = np.where(scales > 0, np.maximum(scales, SMALLEST[scale_type]), np.float32(1))
    if scale_type is ScaleType.F32:
        return short_scales(filled) if scheme.offset else np.asarray(filled, np.float32)
    return np.minimum(filled, LARGEST_F16).astype(np.float16).astype(np.float32)


def short_scales(scales: FloatArray) -> FloatArray:
    """Scales rounded to 16 significant bits, whose products with levels of 8 bits are exact in float32."""
    mantissa, exponent = np.frexp(scales)
    whole = np.float32(2 ** STEP_BITS[ScaleType.F32])
    return np.asarray(np.ldexp(np.rint(mantissa * whole) / whole, exponent), np.float32)


def round_offsets(offsets: FloatArray, scale_type: ScaleType) -> FloatArray:
    """Round offsets to the storage type of scales."""
    if scale_type is ScaleType.F32:
        return np.asarray(offsets, np.float32)
    return np.clip(offsets, -LARGEST_F16, LARGEST_F16).astype(np.float16).astype(np.float32)


def spread_steps(steps: FloatArray, shape: tuple[int, ...], scale_code: ScaleCode) -> FloatArray:
    """The step of every scale: steps as `store_scales` gives them -> f32 of the scales' shape."""
    if scale_code is ScaleCode.INTEGER:
        return np.broadcast_to(steps.reshape(-1, *[1] * (len(shape) - 1)), shape)
    return np.repeat(steps, GROUP)[: int(np.prod(shape))].reshape(shape)


def step_count(scales: tuple[int, int, int], scale_code: ScaleCode) -> int:
    """Steps of scales of this shape; 0 for plain ones."""
    if scale_code is ScaleCode.PLAIN:
        return 0
    return scales[0] if scale_code is ScaleCode.INTEGER else -(-int(np.prod(scales)) // GROUP)


def _groups(scales: FloatArray, scale_code: ScaleCode) -> FloatArray:
    """Scales that share a step as rows, the last one filled with zeros."""
    if scale_code is ScaleCode.INTEGER:
        return scales.reshape(scales.shape[0], -1)
    padded = np.zeros(-(-scales.size // GROUP) * GROUP, np.float32)
    padded[: scales.size] = scales.reshape(-1)
    return padded.reshape(-1, GROUP)


def _steps(peaks: FloatArray, scheme: QuantScheme) -> FloatArray:
    """The step of each group from its largest scale: a power of two for double quantization."""
    ratio = np.where(peaks > 0, peaks, np.float32(scheme.largest_scale_code)) / np.float32(scheme.largest_scale_code)
    mantissa, exponent = np.frexp(ratio)
    if scheme.scale_code is ScaleCode.DOUBLE:
        steps = np.ldexp(np.float32(1), np.where(mantissa > 0.5, exponent, exponent - 1))
    else:
        whole = np.float32(2 ** STEP_BITS[scheme.scale_type])
        steps = np.ldexp(np.rint(mantissa * whole) / whole, exponent)
    smallest = SMALLEST_STEP[scheme.scale_type]
    if scheme.scale_type is ScaleType.F16:
        steps = np.rint(steps / smallest) * smallest
    return np.asarray(np.maximum(steps, smallest), np.float32)
