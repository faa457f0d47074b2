"""Sums, quotients and square roots of int32 numbers: ONNX functions and what they mean in numpy.

All of it is exact in int64 but for one rounding at the end, to nearest, halves up. Steps are chosen by the rewrite:
factors are powers of two, so that a result's step is its operands' times a power of two. No kernel is written for
them: `kbitc.graph.functions.inline_plain` puts their bodies in place before a model is lowered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.graph import integer_text as text
from kbitc.graph.integer_nonlinear import NORM_BITS, square_root

SUM = "IntegerSum"
QUOTIENT = "IntegerQuotient"
NORM2 = "IntegerReduceL2"
SQRT = "IntegerSqrt"

#: |numerator| < 2^31 and factors up to 2^30 stay below 2^61.
MAX_FACTOR_BITS = 30
#: n 2^(2 * NORM_BITS) factor <= 2^60 under a root: its result is at most 2^30.
ROOT_BITS = 60

#: What is left of a sum or quotient: two of them add up in int32.
WIDE_LIMIT = 1 << 29
#: Fraction bits of a mean whose count is known at run time.
MEAN_BITS = 14

IntArray = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]

_LIMIT = """
    lowest = Neg(limit)"""
# The nearest root of `scaled`, 0 where it is not positive. `rooted` wants digits along an axis of their own.
_ROOT = (
    """
    behind = Constant<value_ints = [-1]>()
    number0 = Unsqueeze(scaled, behind)
    unit = Constant<value_int = 1>()
    is_zero = Less(number0, unit)
    number = Where(is_zero, unit, number0)""",
    text.rooted("number", "root"),
    """
    apart1 = Mul(root, root)
    apart = Sub(number, apart1)
    up = Less(root, apart)
    up1 = Cast<to = 7>(up)
    near = Add(root, up1)
    zero = Constant<value_int = 0>()
    made = Where(is_zero, zero, near)
    made1 = Squeeze(made, behind)
    Y = Cast<to = 6>(made1)""",
)

BODIES = {
    # x i32, axes i64 [n], factor, divisor, limit i64 scalars -> i32.
    SUM: text.function(
        "IntegerSum <keepdims> (x, axes, factor, divisor, limit)",
        """
        wide = Cast<to = 7>(x)
        sum = ReduceSum<keepdims: int = @keepdims>(wide, axes)
        number = Mul(sum, factor)""",
        text.divided("number", "divisor", "quotient"),
        _LIMIT,
        text.limited("quotient", "lowest", "limit", "clipped"),
        "Y = Cast<to = 6>(clipped)",
    ),
    # a i32, b i32 (broadcast), factor, divisor, limit i64 scalars -> i32.
    QUOTIENT: text.function(
        "IntegerQuotient (a, b, factor, divisor, limit)",
        """
        a1 = Cast<to = 7>(a)
        number = Mul(a1, factor)
        b1 = Cast<to = 7>(b)
        unit = Constant<value_int = 1>()
        is_small = Less(b1, unit)
        b2 = Where(is_small, unit, b1)
        below = Mul(b2, divisor)""",
        text.divided("number", "below", "quotient"),
        _LIMIT,
        text.limited("quotient", "lowest", "limit", "clipped"),
        "Y = Cast<to = 6>(clipped)",
    ),
    # x i32, axes i64 [n], factor i64 scalar -> i32.
    NORM2: text.function(
        "IntegerReduceL2 <keepdims> (x, axes, factor)",
        """
        wide = Cast<to = 7>(x)
        square = Mul(wide, wide)
        energy = ReduceSum<keepdims: int = @keepdims>(square, axes)
        scaled = Mul(energy, factor)""",
        *_ROOT,
    ),
    # x i32, factor i64 scalar -> i32.
    SQRT: text.function(
        "IntegerSqrt (x, factor)",
        """
        wide = Cast<to = 7>(x)
        scaled = Mul(wide, factor)""",
        *_ROOT,
    ),
}


def integer_sum(
    x: IntArray, axes: tuple[int, ...], factor: int, divisor: int, limit: int, *, keepdims: bool = True
) -> npt.NDArray[np.int32]:
    """The sum over axes times factor / divisor, rounded, limited to [-limit, limit].

    Args:
        x: i32; the sum of |x| times the factor is below 2^61.
        axes: what is summed.
        factor: 1 .. 2^30.
        divisor: 1 .. 2^61; a count makes a mean.
        limit: below 2^31.
        keepdims: keep the summed axes with one element.
    """
    total = x.astype(np.int64).sum(axis=axes, keepdims=keepdims) * factor
    return _near(total, np.int64(divisor), limit)


def quotient(a: IntArray, b: IntArray, factor: int, divisor: int, limit: int) -> npt.NDArray[np.int32]:
    """a / max(b, 1) times factor / divisor, rounded, limited to [-limit, limit].

    With exact operands the result is off by half a step. An operand b that is off by e steps makes a factor of up to
    1 + e / (b - e).

    Args:
        a, b: i32, broadcast; a divisor below one step counts as one step.
        factor, divisor: 1 .. 2^30.
        limit: below 2^31.
    """
    return _near(a.astype(np.int64) * factor, np.maximum(b.astype(np.int64), 1) * divisor, limit)


def norm2(x: IntArray, axes: tuple[int, ...], factor: int, *, keepdims: bool = True) -> npt.NDArray[np.int32]:
    """sqrt(factor * sum of x^2 over axes), rounded to nearest.

    Args:
        x: i32, |x| <= 2^17; with n numbers in a sum, n 2^34 factor <= 2^60.
        axes: what is summed.
        factor: 4^f: the result has f more fraction bits than x.
        keepdims: keep the summed axes with one element.
    """
    wide = x.astype(np.int64)
    return _near_root((wide * wide).sum(axis=axes, keepdims=keepdims) * factor)


def norm2_bits(count: int) -> int:
    """The most fraction bits that a sum of so many squares leaves room for; negative when it has none."""
    return (ROOT_BITS - 2 * NORM_BITS - (count - 1).bit_length()) // 2


def sqrt(x: IntArray, factor: int) -> npt.NDArray[np.int32]:
    """sqrt(max(x, 0) factor), rounded to nearest. x: i32. factor: up to 2^28."""
    return _near_root(x.astype(np.int64) * factor)


def _near(number: Int64, divisor: Int64 | np.int64, limit: int) -> npt.NDArray[np.int32]:
    return np.asarray(np.clip((2 * number + divisor) // (2 * divisor), -limit, limit), np.int32)


def _near_root(number: Int64) -> npt.NDArray[np.int32]:
    positive = np.maximum(number, 1)
    root = square_root(positive)
    return np.asarray(np.where(number < 1, 0, root + (positive - root * root > root)), np.int32)
