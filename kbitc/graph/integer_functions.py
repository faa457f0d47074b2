"""Model-local ONNX functions of integer graphs, and what they mean in numpy.

All arithmetic is on integers, so every runtime and every target must give the same numbers. Bodies limit int64 by Less
and Where: Clip, Min and Max of onnxruntime 1.31 are wrong for int64 numbers in [2^31, 2^32).

The one rounding rule: a product is divided by 2^shift rounding half up, floor((x + 2^(shift - 1)) / 2^shift).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.graph import integer_text as text
from kbitc.quant.packing import unpack_dense

REQUANTIZE = "Requantize"
INTEGER_ADD = "IntegerAdd"
INTEGER_MUL = "IntegerMul"
INTEGER_PRELU = "IntegerPRelu"
TABLE = "Table"
LEVELS = "LevelsKBit"
BLOCK_LEVELS = "BlockLevelsKBit"

#: A multiplier of Requantize is 0 or in [2^30, 2^31), its shift in 1 .. 62.
MULTIPLIER_BITS = 31
#: Of these, factors of codes have as many as a float32 number.
SINGLE_BITS = 24
#: With so many zeros at its end, an odd multiple of half a code is 2^9 codes and more.
MOST_ZEROS = 20
MAX_SHIFT = 62
#: Multipliers of IntegerAdd and IntegerPRelu are at most 2^21 in magnitude, shifts 1 .. 30: 2 * 255 * 2^21 < 2^30.
ADD_MULTIPLIER_LIMIT = 1 << 21
ADD_MAX_SHIFT = 30

IntArray = npt.NDArray[np.integer[Any]]

# name -> functions of this domain that its body calls.
CALLS: dict[str, tuple[str, ...]] = {LEVELS: ("UnpackKBit",), BLOCK_LEVELS: ("UnpackKBit",)}

BODIES = {
    # acc i32, multiplier i32 [1] or [N] along axis >= 0, shift i32 likewise, zero i32 scalar -> u8 like acc.
    REQUANTIZE: text.function(
        "Requantize <axis, low, high> (acc, multiplier, shift, zero)",
        text.PER_CHANNEL,
        text.shifted("product", "shift1", "quotient"),
        """
        zero1 = Cast<to = 7>(zero)
        moved = Add(quotient, zero1)""",
        text.LIMITS,
        text.limited("moved", "low", "high", "clipped"),
        "Y = Cast<to = 2>(clipped)",
    ),
    # a u8, b u8 (broadcast); a_zero, b_zero, a_mult, b_mult, shift, zero i32 scalars -> u8.
    INTEGER_ADD: text.function(
        "IntegerAdd <low, high> (a, b, a_zero, b_zero, a_mult, b_mult, shift, zero)",
        """
        a1 = Cast<to = 6>(a)
        b1 = Cast<to = 6>(b)
        a2 = Sub(a1, a_zero)
        b2 = Sub(b1, b_zero)
        a3 = Mul(a2, a_mult)
        b3 = Mul(b2, b_mult)
        sum = Add(a3, b3)""",
        text.shifted("sum", "shift", "quotient", 32),
        "moved = Add(quotient, zero)",
        text.LIMITS,
        """
        low1 = Cast<to = 6>(low)
        high1 = Cast<to = 6>(high)
        clipped = Clip(moved, low1, high1)
        Y = Cast<to = 2>(clipped)""",
    ),
    # a u8, b u8 (broadcast), a_zero, b_zero i32 scalars -> i32.
    INTEGER_MUL: text.function(
        "IntegerMul (a, b, a_zero, b_zero)",
        """
        a1 = Cast<to = 6>(a)
        b1 = Cast<to = 6>(b)
        a2 = Sub(a1, a_zero)
        b2 = Sub(b1, b_zero)
        Y = Mul(a2, b2)""",
    ),
    # x u8, below i32 that broadcasts to x, x_zero, above, shift, zero i32 scalars -> u8.
    INTEGER_PRELU: text.function(
        "IntegerPRelu <low, high> (x, below, x_zero, above, shift, zero)",
        """
        x1 = Cast<to = 6>(x)
        x2 = Sub(x1, x_zero)
        is_below = Less(x1, x_zero)
        factor = Where(is_below, below, above)
        product = Mul(x2, factor)""",
        text.shifted("product", "shift", "quotient", 32),
        "moved = Add(quotient, zero)",
        text.LIMITS,
        """
        low1 = Cast<to = 6>(low)
        high1 = Cast<to = 6>(high)
        clipped = Clip(moved, low1, high1)
        Y = Cast<to = 2>(clipped)""",
    ),
    # q u8 of any shape, table u8 [256] -> u8.
    TABLE: text.function(
        "Table (q, table)",
        """
        index = Cast<to = 6>(q)
        Y = Gather(table, index)""",
    ),
    # stream u8, grid i8 [2^bits], shape i64 [3] = N, T, C -> i8 [N, T, C].
    LEVELS: """
<domain: "kbitc", opset_import: ["" : {opset}, "kbitc" : 1]>
LevelsKBit <bits> (stream, grid, shape) => (Y) {{
    codes = kbitc.UnpackKBit<bits: int = @bits>(stream, shape)
    Y = Gather(grid, codes)
}}""",
    # As above times blockscale i8 [N, T, CB], one factor for `block` channels; every product fits int8.
    BLOCK_LEVELS: """
<domain: "kbitc", opset_import: ["" : {opset}, "kbitc" : 1]>
BlockLevelsKBit <bits, block> (stream, grid, blockscale, shape) => (Y) {{
    codes = kbitc.UnpackKBit<bits: int = @bits>(stream, shape)
    levels = Gather(grid, codes)"""
    + text.BLOCK_OF_CHANNEL
    + """
    factor = Gather<axis = 2>(blockscale, which)
    levels1 = Cast<to = 6>(levels)
    factor1 = Cast<to = 6>(factor)
    product = Mul(levels1, factor1)
    Y = Cast<to = 3>(product)
}}""",
}


def requantize(
    acc: IntArray, multiplier: IntArray, shift: IntArray, zero: int, *, axis: int, low: int, high: int
) -> npt.NDArray[np.uint8]:
    """clip(((acc * multiplier + 2^(shift - 1)) >> shift) + zero, low, high).

    Args:
        acc: i32, any shape of rank > axis.
        multiplier: i32 [1] or [N], 0 or in [2^30, 2^31).
        shift: i32 [1] or [N], 1 .. 62.
        zero: zero point of the result.
        axis: the axis of `acc` that has N elements, from the front.
        low: smallest code of the result (a Relu in the result's units).
        high: largest code.
    """
    shape = (-1, *(1,) * (acc.ndim - axis - 1))
    factor = np.asarray(multiplier, np.int64).reshape(shape)
    bits = np.asarray(shift, np.int64).reshape(shape)
    quotient = (acc.astype(np.int64) * factor + (np.int64(1) << (bits - 1))) >> bits
    return np.asarray(np.clip(quotient + zero, low, high), np.uint8)


def integer_add(
    a: npt.NDArray[np.uint8],
    b: npt.NDArray[np.uint8],
    *,
    a_zero: int,
    b_zero: int,
    a_mult: int,
    b_mult: int,
    shift: int,
    zero: int,
    low: int,
    high: int,
) -> npt.NDArray[np.uint8]:
    """clip((((a - a_zero) a_mult + (b - b_zero) b_mult + 2^(shift - 1)) >> shift) + zero, low, high), broadcast."""
    total = (a.astype(np.int64) - a_zero) * a_mult + (b.astype(np.int64) - b_zero) * b_mult
    return np.asarray(np.clip(((total + (1 << (shift - 1))) >> shift) + zero, low, high), np.uint8)


def integer_mul(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], a_zero: int, b_zero: int) -> npt.NDArray[np.int32]:
    """(a - a_zero) (b - b_zero), i32, broadcast."""
    return np.asarray((a.astype(np.int32) - a_zero) * (b.astype(np.int32) - b_zero), np.int32)


def integer_prelu(
    x: npt.NDArray[np.uint8], below: IntArray, *, x_zero: int, above: int, shift: int, zero: int, low: int, high: int
) -> npt.NDArray[np.uint8]:
    """clip((((x - x_zero) factor + 2^(shift - 1)) >> shift) + zero, low, high), factor = above, or below if x < x_zero.

    Args:
        x: codes.
        below: i32, broadcast to x; |below| <= 2^21.
        x_zero: zero point of x.
        above: |above| <= 2^21.
        shift: 1 .. 30.
        zero: zero point of the result.
        low: smallest code of the result.
        high: largest code.
    """
    number = x.astype(np.int64) - x_zero
    product = number * np.where(number < 0, below, above)
    return np.asarray(np.clip(((product + (1 << (shift - 1))) >> shift) + zero, low, high), np.uint8)


def table(q: npt.NDArray[np.uint8], entries: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """entries[q]."""
    return entries[q]


def levels(
    stream: npt.NDArray[np.uint8],
    grid: npt.NDArray[np.int8],
    shape: tuple[int, int, int],
    bits: int,
    blockscale: npt.NDArray[np.int8] | None = None,
    block: int = 1,
) -> npt.NDArray[np.int8]:
    """The int8 weight levels [N, T, C] behind a dense stream of codes, times one factor a block when there is one."""
    count = int(np.prod(shape))
    found = grid[unpack_dense(stream, bits, count).reshape(shape)]
    if blockscale is None:
        return found
    factors = np.repeat(blockscale, block, axis=2)[:, :, : shape[2]]
    return np.asarray(found.astype(np.int32) * factors, np.int8)


def fixed_point(ratio: float) -> tuple[int, int]:
    """(multiplier, shift) of Requantize with multiplier / 2^shift nearest to a ratio >= 0.

    The multiplier has 31 bits, so the relative error is at most 2^-31. A ratio under 2^-32 (shift over 62) gives
    (0, 1): every accumulator is then rounded to 0, as |acc| < 2^31 times the ratio is under one half.

    Raises:
        ValueError: the ratio is negative, not finite, or 2^29 or more.
    """
    if not 0 <= ratio < 2.0**29:
        raise ValueError(f"a rescaling factor must lie in [0, 2^29), got {ratio}")
    if ratio == 0:
        return 0, 1
    fraction, exponent = np.frexp(np.float64(ratio))  # ratio = fraction 2^exponent, fraction in [1/2, 1)
    multiplier = round(float(fraction) * (1 << MULTIPLIER_BITS))
    shift = MULTIPLIER_BITS - int(exponent)
    if multiplier == 1 << MULTIPLIER_BITS:
        multiplier, shift = multiplier >> 1, shift - 1
    return (multiplier, shift) if shift <= MAX_SHIFT else (0, 1)


def code_factor(ratio: float) -> tuple[int, int]:
    """(multiplier, shift) of Requantize with multiplier / 2^shift next to a ratio >= 0, and a float32 number.

    The multiplier has 24 bits and seven zeros behind them; the relative error is at most 2^-24 + 2^-31. A multiplier
    that ends in more than MOST_ZEROS zeros, which the ratio does not equal, gets one more of its 24-bit steps: then
    acc * multiplier / 2^shift is the middle of two integers only where it is 2^9 and more, and kernels may round by
    one float32 multiply-add (targets/kernels/requantize.py).

    Raises:
        ValueError: as `fixed_point`.
    """
    multiplier, shift = fixed_point(ratio)
    unit = 1 << (MULTIPLIER_BITS - SINGLE_BITS)
    nearest = (multiplier + unit // 2) // unit * unit
    if nearest == 1 << MULTIPLIER_BITS:
        nearest, shift = nearest >> 1, shift - 1
    if nearest % (2 << MOST_ZEROS) == 0 and nearest * 2.0**-shift != ratio:
        nearest += unit
    return (nearest, shift) if multiplier else (0, 1)
