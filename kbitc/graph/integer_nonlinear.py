"""Softmax and layer normalization on integers: ONNX functions and what they mean in numpy.

After I-BERT (Kim et al., arXiv 2101.01321) and I-ViT (Li and Gu, arXiv 2207.01405), with a table of 256 powers of two
in place of their polynomials, and every rounding stated. Numbers are kept positive before a division or a shift, so
that no rule about negative operands is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RESCALE = "Rescale"
SOFTMAX = "IntegerSoftmax"
LAYER_NORM = "IntegerLayerNorm"

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
_NEWTON_STEPS = 6

IntArray = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]


def _newton() -> str:
    """Newton's steps for the square root of `q`, from a power of two above it."""
    lines = []
    for step in range(_NEWTON_STEPS):
        lines += [
            f"    quotient{step} = Div(q, root{step})",
            f"    total{step} = Add(root{step}, quotient{step})",
            f"    root{step + 1} = Div(total{step}, two)",
        ]
    return "\n".join(lines)


BODIES = {
    # acc i32, multiplier and shift i32 [1] or [N] along axis: i32 in [low, high].
    RESCALE: """
<domain: "kbitc", opset_import: ["" : {opset}]>
Rescale <axis, low, high> (acc, multiplier, shift) => (Y) {{
    one = Constant<value_ints = [1]>()
    minus = Constant<value_ints = [-1]>()
    end = Constant<value_ints = [1000]>()
    axis0 = Constant<value_int: int = @axis>()
    after = Add(axis0, one)
    dims = Shape(acc)
    behind = Slice(dims, after, end)
    behind_rank = Shape(behind)
    ones = ConstantOfShape<value = int64[1] {{1}}>(behind_rank)
    channel_shape = Concat<axis = 0>(minus, ones)
    multiplier1 = Reshape(multiplier, channel_shape)
    shift1 = Reshape(shift, channel_shape)
    wide = Cast<to = 7>(acc)
    multiplier2 = Cast<to = 7>(multiplier1)
    product = Mul(wide, multiplier2)
    offset = Constant<value = int64 {{4611686018427387904}}>()
    raised = Add(product, offset)
    raised_u = Cast<to = 13>(raised)
    shift2 = Cast<to = 13>(shift1)
    unit = Constant<value = uint64 {{1}}>()
    half_shift = Sub(shift2, unit)
    half = BitShift<direction = "LEFT">(unit, half_shift)
    rounded = Add(raised_u, half)
    shifted_u = BitShift<direction = "RIGHT">(rounded, shift2)
    shifted = Cast<to = 7>(shifted_u)
    offset_u = Cast<to = 13>(offset)
    lowered_u = BitShift<direction = "RIGHT">(offset_u, shift2)
    lowered = Cast<to = 7>(lowered_u)
    quotient = Sub(shifted, lowered)
    low0 = Constant<value_int: int = @low>()
    high0 = Constant<value_int: int = @high>()
    is_low = Less(quotient, low0)
    floored = Where(is_low, low0, quotient)
    is_high = Less(high0, floored)
    clipped = Where(is_high, high0, floored)
    Y = Cast<to = 6>(clipped)
}}""",
    # x i32, multiplier and shift i32 scalars (x log2(e) in units of 2^-8), powers i32 [256] -> u8 of scale 1 / 255.
    SOFTMAX: f"""
<domain: "kbitc", opset_import: ["" : {{opset}}]>
IntegerSoftmax <axis> (x, multiplier, shift, powers) => (Y) {{{{
    one = Constant<value_ints = [1]>()
    axis0 = Constant<value_int: int = @axis>()
    axes = Reshape(axis0, one)
    wide = Cast<to = 7>(x)
    peak32 = ReduceMax<keepdims = 1>(x, axes)
    peak = Cast<to = 7>(peak32)
    below = Sub(peak, wide)
    multiplier1 = Cast<to = 7>(multiplier)
    product = Mul(below, multiplier1)
    product_u = Cast<to = 13>(product)
    shift1 = Cast<to = 13>(shift)
    unit = Constant<value = uint64 {{{{1}}}}>()
    half_shift = Sub(shift1, unit)
    half = BitShift<direction = "LEFT">(unit, half_shift)
    rounded = Add(product_u, half)
    exponent = BitShift<direction = "RIGHT">(rounded, shift1)
    fraction_mask = Constant<value = uint64 {{{{{(1 << FRACTION_BITS) - 1}}}}}>()
    fraction_u = BitwiseAnd(exponent, fraction_mask)
    fraction = Cast<to = 7>(fraction_u)
    power32 = Gather(powers, fraction)
    power = Cast<to = 13>(power32)
    fraction_bits = Constant<value = uint64 {{{{{FRACTION_BITS}}}}}>()
    whole = BitShift<direction = "RIGHT">(exponent, fraction_bits)
    most = Constant<value = uint64 {{{{{MAX_EXPONENT}}}}}>()
    whole1 = Min(whole, most)
    value_u = BitShift<direction = "RIGHT">(power, whole1)
    value = Cast<to = 7>(value_u)
    total = ReduceSum<keepdims = 1>(value, axes)
    steps = Constant<value_int = {2 * PROBABILITY_STEPS}>()
    scaled = Mul(value, steps)
    scaled1 = Add(scaled, total)
    two = Constant<value_int = 2>()
    total2 = Mul(total, two)
    share = Div(scaled1, total2)
    Y = Cast<to = 2>(share)
}}}}""",
    # x i32 [.., C], gain i32 [C] (signed), bias i32 [C], epsilon i64 scalar >= 1, shift i32 scalar -> i32 [.., C].
    LAYER_NORM: f"""
<domain: "kbitc", opset_import: ["" : {{opset}}]>
IntegerLayerNorm (x, gain, bias, epsilon, shift) => (Y) {{{{
    last = Constant<value_ints = [-1]>()
    two = Constant<value_int = 2>()
    wide = Cast<to = 7>(x)
    dims = Shape(x)
    count1 = Gather(dims, last)
    count = Squeeze(count1)
    sum = ReduceSum<keepdims = 1>(wide, last)
    reach = Constant<value_int = {1 << (NORM_BITS + 1)}>()
    raise = Mul(count, reach)
    sum1 = Add(sum, raise)
    sum2 = Mul(sum1, two)
    sum3 = Add(sum2, count)
    count2 = Mul(count, two)
    mean1 = Div(sum3, count2)
    mean = Sub(mean1, reach)
    difference = Sub(wide, mean)
    square = Mul(difference, difference)
    energy = ReduceSum<keepdims = 1>(square, last)
    unit = Constant<value_int = {1 << VARIANCE_BITS}>()
    energy1 = Mul(energy, unit)
    variance = Div(energy1, count)
    q = Add(variance, epsilon)
    thresholds = Constant<value_ints = [{", ".join(str(4**k) for k in range(31))}]>()
    reached = GreaterOrEqual(q, thresholds)
    reached1 = Cast<to = 7>(reached)
    digits = ReduceSum<keepdims = 1>(reached1, last)
    digits_u = Cast<to = 13>(digits)
    unit_u = Constant<value = uint64 {{{{1}}}}>()
    start = BitShift<direction = "LEFT">(unit_u, digits_u)
    root0 = Cast<to = 7>(start)
{_newton()}
    over = Mul(root{_NEWTON_STEPS}, root{_NEWTON_STEPS})
    is_over = Less(q, over)
    excess = Cast<to = 7>(is_over)
    root = Sub(root{_NEWTON_STEPS}, excess)
    fine = Constant<value_int = {1 << (RATIO_BITS + VARIANCE_BITS // 2 + 1)}>()
    ratio1 = Mul(difference, fine)
    lift = Constant<value_int = {1 << 25}>()
    lifted = Mul(root, lift)
    ratio2 = Add(ratio1, lifted)
    ratio3 = Add(ratio2, root)
    twice = Mul(root, two)
    ratio4 = Div(ratio3, twice)
    level = Constant<value_int = {1 << 24}>()
    ratio = Sub(ratio4, level)
    gain1 = Cast<to = 7>(gain)
    product = Mul(ratio, gain1)
    offset = Constant<value_int = {1 << 60}>()
    raised = Add(product, offset)
    raised_u = Cast<to = 13>(raised)
    shift1 = Cast<to = 13>(shift)
    half_shift = Sub(shift1, unit_u)
    half = BitShift<direction = "LEFT">(unit_u, half_shift)
    rounded = Add(raised_u, half)
    shifted_u = BitShift<direction = "RIGHT">(rounded, shift1)
    shifted = Cast<to = 7>(shifted_u)
    offset_u = Cast<to = 13>(offset)
    lowered_u = BitShift<direction = "RIGHT">(offset_u, shift1)
    lowered = Cast<to = 7>(lowered_u)
    scaled = Sub(shifted, lowered)
    bias1 = Cast<to = 7>(bias)
    moved = Add(scaled, bias1)
    Y = Cast<to = 6>(moved)
}}}}""",
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
    below = wide.max(axis=axis, keepdims=True) - wide
    exponent = (below * multiplier + (1 << (shift - 1))) >> shift
    value = powers().astype(np.int64)[exponent & 255] >> np.minimum(exponent >> 8, MAX_EXPONENT)
    total = value.sum(axis=axis, keepdims=True)
    return np.asarray((2 * PROBABILITY_STEPS * value + total) // (2 * total), np.uint8)


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
    difference = wide - mean
    variance = (difference * difference).sum(-1, keepdims=True) * (1 << VARIANCE_BITS) // count + epsilon
    root = square_root(variance)
    ratio = (2 * (difference << (RATIO_BITS + VARIANCE_BITS // 2)) + root) // (2 * root)
    return np.asarray(((ratio * gain.astype(np.int64) + (1 << (shift - 1))) >> shift) + bias, np.int32)


def square_root(numbers: Int64) -> Int64:
    """floor(sqrt(n)) of positive integers below 2^62, exactly."""
    root = np.sqrt(numbers.astype(np.float64)).astype(np.int64)
    root -= root * root > numbers
    return np.asarray(root + ((root + 1) * (root + 1) <= numbers), np.int64)
