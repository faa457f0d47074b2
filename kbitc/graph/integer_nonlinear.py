"""Softmax, exp and normalizations on integers: ONNX functions and what they mean in numpy.

After I-BERT (Kim et al., arXiv 2101.01321) and I-ViT (Li and Gu, arXiv 2207.01405), with a table of 256 powers of two
in place of their polynomials, and every rounding stated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.graph import integer_text as text

RESCALE = "Rescale"
SOFTMAX = "IntegerSoftmax"
EXP = "IntegerExp"
LAYER_NORM = "IntegerLayerNorm"
RMS_NORM = "IntegerRMSNorm"

#: Bits of the entries of the table of powers, and of the fraction of an exponent.
POWER_BITS, FRACTION_BITS = 24, 8
#: Probabilities have the scale 1 / 255 and the zero point 0.
PROBABILITY_STEPS = 255
#: Largest exponent that leaves something of a power.
MAX_EXPONENT = 40
#: |x| of a layer normalization is below 2^17, and it has at most 4096 channels: 2^36 2^12 2^14 = 2^62.
NORM_BITS, NORM_CHANNELS = 17, 4096
#: Fraction bits of the variance (even) and of the normalized numbers.
VARIANCE_BITS, RATIO_BITS = 14, 15

IntArray = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]


#: value = 2^(24 - t / 256) with t = round(below multiplier / 2^shift), below >= 0, rounded down to whole units.
_POWERS = f"""
    multiplier1 = Cast<to = 7>(multiplier)
    product = Mul(below, multiplier1)
    product_u = Cast<to = 13>(product)
    {text.shifted_positive("product_u", "shift", "exponent").strip()}
    fraction_mask0 = Constant<value_int = {(1 << FRACTION_BITS) - 1}>()
    fraction_mask = Cast<to = 13>(fraction_mask0)
    fraction_u = BitwiseAnd(exponent, fraction_mask)
    fraction = Cast<to = 7>(fraction_u)
    power32 = Gather(powers, fraction)
    power = Cast<to = 13>(power32)
    fraction_bits0 = Constant<value_int = {FRACTION_BITS}>()
    fraction_bits = Cast<to = 13>(fraction_bits0)
    whole = BitShift<direction = "RIGHT">(exponent, fraction_bits)
    most0 = Constant<value_int = {MAX_EXPONENT}>()
    most = Cast<to = 13>(most0)
    whole1 = Min(whole, most)
    value_u = BitShift<direction = "RIGHT">(power, whole1)
    value = Cast<to = 7>(value_u)"""


def _norm(name: str, bias: str, difference: str, moved: str) -> str:
    """A normalization along the last axis: `difference` makes the numbers, `moved` adds what comes last."""
    return text.function(
        f"{name} (x, gain,{bias} epsilon, shift)",
        """
        last = Constant<value_ints = [-1]>()
        two = Constant<value_int = 2>()
        wide = Cast<to = 7>(x)
        dims = Shape(x)
        count1 = Gather(dims, last)
        count = Squeeze(count1)""",
        difference,
        f"""
        square = Mul(difference, difference)
        energy = ReduceSum<keepdims = 1>(square, last)
        unit = Constant<value_int = {1 << VARIANCE_BITS}>()
        energy1 = Mul(energy, unit)
        variance = Div(energy1, count)
        q = Add(variance, epsilon)""",
        text.rooted("q", "root"),
        f"""
        fine = Constant<value_int = {1 << (RATIO_BITS + VARIANCE_BITS // 2)}>()
        number = Mul(difference, fine)""",
        text.divided("number", "root", "ratio"),
        """
        gain1 = Cast<to = 7>(gain)
        product = Mul(ratio, gain1)""",
        text.shifted("product", "shift", "scaled"),
        moved,
        "Y = Cast<to = 6>(moved)",
    )


BODIES = {
    # acc i32, multiplier and shift i32 [1] or [N] along axis: i32 in [low, high].
    RESCALE: text.function(
        "Rescale <axis, low, high> (acc, multiplier, shift)",
        text.PER_CHANNEL,
        text.shifted("product", "shift1", "quotient"),
        text.LIMITS,
        text.limited("quotient", "low", "high", "clipped"),
        "Y = Cast<to = 6>(clipped)",
    ),
    # x i32, multiplier and shift i32 scalars (x log2(e) in units of 2^-8), powers i32 [256] -> u8 of scale 1 / 255.
    SOFTMAX: text.function(
        "IntegerSoftmax <axis> (x, multiplier, shift, powers)",
        """
        one = Constant<value_ints = [1]>()
        axis0 = Constant<value_int: int = @axis>()
        axes = Reshape(axis0, one)
        wide = Cast<to = 7>(x)
        peak32 = ReduceMax<keepdims = 1>(x, axes)
        peak = Cast<to = 7>(peak32)
        below = Sub(peak, wide)""",
        _POWERS,
        "total = ReduceSum<keepdims = 1>(value, axes)",
        f"""
        steps = Constant<value_int = {PROBABILITY_STEPS}>()
        scaled = Mul(value, steps)""",
        text.divided("scaled", "total", "share"),
        "Y = Cast<to = 2>(share)",
    ),
    # x i32, peak, multiplier, shift i32 scalars, powers i32 [256] -> i32, 2^24 for peak and above.
    EXP: text.function(
        "IntegerExp (x, peak, multiplier, shift, powers)",
        """
        zero = Constant<value_int = 0>()
        wide = Cast<to = 7>(x)
        peak1 = Cast<to = 7>(peak)
        difference = Sub(peak1, wide)
        is_above = Less(difference, zero)
        below = Where(is_above, zero, difference)""",
        _POWERS,
        "Y = Cast<to = 6>(value)",
    ),
    # x i32 [.., C], gain i32 [C] (signed), bias i32 [C], epsilon i64 scalar >= 1, shift i32 scalar -> i32 [.., C].
    LAYER_NORM: _norm(
        LAYER_NORM,
        " bias,",
        "sum = ReduceSum<keepdims = 1>(wide, last)\n"
        + text.divided("sum", "count", "mean")
        + "\ndifference = Sub(wide, mean)",
        """
        bias1 = Cast<to = 7>(bias)
        moved = Add(scaled, bias1)""",
    ),
    # The same without a mean and a bias (Zhang and Sennrich, arXiv 1910.07467, eq. 4).
    RMS_NORM: _norm(RMS_NORM, "", "difference = Identity(wide)", "moved = Identity(scaled)"),
}


def powers() -> npt.NDArray[np.int32]:
    """2^(24 - i / 256) rounded, i32 [256]: the table of IntegerSoftmax."""
    exponents = POWER_BITS - np.arange(1 << FRACTION_BITS) / (1 << FRACTION_BITS)
    return np.asarray(np.rint(2.0**exponents), np.int32)


def rescale(
    acc: IntArray, multiplier: IntArray, shift: IntArray, *, axis: int, low: int, high: int
) -> npt.NDArray[np.int32]:
    """clip((acc * multiplier + 2^(shift - 1)) >> shift, low, high), i32; arguments as for `requantize`."""
    shape = (-1, *(1,) * (acc.ndim - axis - 1))
    bits = np.asarray(shift, np.int64).reshape(shape)
    product = acc.astype(np.int64) * np.asarray(multiplier, np.int64).reshape(shape)
    return np.asarray(np.clip((product + (np.int64(1) << (bits - 1))) >> bits, low, high), np.int32)


def softmax(x: IntArray, multiplier: int, shift: int, axis: int = -1) -> npt.NDArray[np.uint8]:
    """Codes of scale 1 / 255 of softmax(x ln(2) 2^-8 multiplier / 2^shift) along an axis.

    With t = round((max(x) - x) multiplier / 2^shift), e = 2^(24 - (t mod 256) / 256) >> (t / 256) and the sum S of e,
    the code is round(255 e / S), halves up.

    Args:
        x: i32; max(x) - x is below 2^32, so that the product stays below 2^63.
        multiplier: below 2^31.
        shift: 1 .. 62.
        axis: the axis that sums to one.
    """
    wide = x.astype(np.int64)
    value = _power(wide.max(axis=axis, keepdims=True) - wide, multiplier, shift)
    total = value.sum(axis=axis, keepdims=True)
    return np.asarray((2 * PROBABILITY_STEPS * value + total) // (2 * total), np.uint8)


def exp(x: IntArray, peak: int, multiplier: int, shift: int) -> npt.NDArray[np.int32]:
    """exp((x - peak) ln(2) 2^-8 multiplier / 2^shift) in units of 2^-24, 2^24 where x is above the peak.

    The exponent is rounded to 1/256 of an octave and the result down to a unit: at most the factor 2^(1/512), half a
    unit of the table and one unit off.

    Args:
        x: i32.
        peak: i32.
        multiplier, shift: as for `softmax`.
    """
    return np.asarray(_power(np.maximum(peak - x.astype(np.int64), 0), multiplier, shift), np.int32)


def _power(below: Int64, multiplier: int, shift: int) -> Int64:
    """2^(24 - t / 256) rounded down, t = round(below multiplier / 2^shift)."""
    exponent = (below * multiplier + (1 << (shift - 1))) >> shift
    return np.asarray(powers().astype(np.int64)[exponent & 255] >> np.minimum(exponent >> 8, MAX_EXPONENT), np.int64)


def layer_norm(x: IntArray, gain: IntArray, bias: IntArray, epsilon: int, shift: int) -> npt.NDArray[np.int32]:
    """((d / sqrt(mean(d^2))) gain >> shift) + bias with d = x - round(mean(x)), along the last axis.

    The variance has 14 fraction bits, its root (rounded down) 7, and d over the root 15 (rounded half up).

    Args:
        x: i32 [.., C], |x| <= 2^17, C <= 4096.
        gain: i32 [C], |gain| < 2^31.
        bias: i32 [C].
        epsilon: what is added to the variance, in its units, at least 1.
        shift: 1 .. 60.
    """
    wide = x.astype(np.int64)
    count = x.shape[-1]
    mean = (2 * wide.sum(-1, keepdims=True) + count) // (2 * count)
    return np.asarray(_normalized(wide - mean, gain, epsilon, shift) + bias, np.int32)


def rms_norm(x: IntArray, gain: IntArray, epsilon: int, shift: int) -> npt.NDArray[np.int32]:
    """(x / sqrt(mean(x^2))) gain >> shift along the last axis; arguments as for `layer_norm`."""
    return np.asarray(_normalized(x.astype(np.int64), gain, epsilon, shift), np.int32)


def _normalized(difference: Int64, gain: IntArray, epsilon: int, shift: int) -> Int64:
    count = difference.shape[-1]
    variance = (difference * difference).sum(-1, keepdims=True) * (1 << VARIANCE_BITS) // count + epsilon
    root = square_root(variance)
    ratio = (2 * (difference << (RATIO_BITS + VARIANCE_BITS // 2)) + root) // (2 * root)
    return np.asarray((ratio * gain.astype(np.int64) + (1 << (shift - 1))) >> shift, np.int64)


def square_root(numbers: Int64) -> Int64:
    """floor(sqrt(n)) of positive integers below 2^62, exactly."""
    root = np.sqrt(numbers.astype(np.float64)).astype(np.int64)
    root -= root * root > numbers
    return np.asarray(root + ((root + 1) * (root + 1) <= numbers), np.int64)
