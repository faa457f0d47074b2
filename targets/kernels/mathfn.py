"""Float functions as TIR expressions: the same float32 operations on every target, so the same results.

Every function takes and returns an expression of type float32 (any number of lanes), has no branch and calls no
library: loops over it vectorise, where `tirx.exp` and friends become one call to libm per lane. A product that
feeds an addition is an explicit `fma`, so it does not depend on what a code generator contracts. Errors are in
units in the last place of the result against float64, measured over the whole range by the tests. NaN gives NaN
unless IEEE 754 says otherwise (pow(NaN, 0) = 1). Subnormal results are right where the hardware keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import op as tir_op

Expr = Any  # a tvm PrimExpr: TVM's own annotations do not name it

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, half to even
_MAGIC64 = 6755399441055744.0  # 1.5 * 2^52, the same for float64
# Cody and Waite split of ln 2: the high part has few bits, so n * LN2_HIGH is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# Cephes expf: (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# The least float32 whose e^x is no less than 2^-126.
_EXP_LEAST = -87.33654
# Cephes logf: (log(1 + f) - f + f^2/2) / f^3 on sqrt(1/2) <= 1 + f < sqrt(2), highest power first.
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
# Cephes tanhf: (tanh(x) - x) / x^3 in x^2 for |x| < 0.625.
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_SMALL = 0.625
# Our own minimax fits: (erf(x) - x) / x in x^2 for |x| < 0.95 (error 2.2e-8) and -log(erfc(x)) on [0.9, 4] (error of
# erf 1.7e-9), where float32 erf rounds to 1.
_ERF = (-5.886776114595705e-4, 4.97311725283723e-3, -2.675333483407192e-2, 1.1281466544886973e-1,
        -3.7612462678061787e-1, 1.28379145417474e-1)  # fmt: skip
_ERFC = (-1.982197261830637e-4, 3.0654909339084763e-3, -2.2315215327828115e-2, 1.0411368289551644e-1,
         6.3697607906507e-1, 1.1277972447548432, 1.664471597644379e-4)  # fmt: skip
_ERF_SMALL = 0.92
# Cephes sinf and cosf on |r| <= pi/4: (sin(r) - r) / r^3 and (cos(r) - 1 + r^2/2) / r^4.
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
# Cephes atanf: (atan(x) - x) / x^3 for |x| <= tan(pi/8); asinf: (asin(x) - x) / x^3 for |x| <= 1/2; sinhf for |x| <= 1.
_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)
_ASIN = (4.2163199048e-2, 2.4181311049e-2, 4.5470025998e-2, 7.4953002686e-2, 1.6666752422e-1)
_SINH = (2.03721912945e-4, 8.33028376239e-3, 1.66667160211e-1)
_HALF_PI_HIGH = 1.5707963267948966
_HALF_PI_LOW = 6.123233995736766e-17
_TRIGONOMETRIC_LIMIT = 2.0**50


class _Names:
    """Gives names to intermediate values, so that an expression used twice is written (and computed) once."""

    def __init__(self) -> None:
        self._bound: list[tuple[Any, Expr]] = []

    def __call__(self, value: Expr) -> Any:
        """A variable that stands for value. Bindings at the top of value become bindings before it (see lets.py)."""
        while isinstance(value, tirx.Let):
            self._bound.append((value.var, value.value))
            value = value.body
        variable = tirx.Var("t", value.ty.dtype)
        self._bound.append((variable, value))
        return variable

    def close(self, result: Expr) -> Expr:
        """The result with all the names it uses bound around it."""
        for variable, value in reversed(self._bound):
            result = tirx.Let(variable, value, result)
        return result


def _lanes(x: Expr) -> str:
    """The lanes suffix of a type: "" for a scalar, "x16" for 16 lanes."""
    text = str(x.ty.dtype)
    return text[text.index("x") :] if "x" in text else ""


def constant(value: float, like: Expr) -> Expr:
    """value as a float32 constant with the lanes of `like`."""
    return tirx.const(value, "float32" + _lanes(like))


def _typed(value: float, dtype: str, like: Expr) -> Expr:
    return tirx.const(value, dtype + _lanes(like))


def _bits(x: Expr, dtype: str) -> Expr:
    return tir_op.reinterpret(dtype + _lanes(x), x)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c with one rounding."""
    return tir_op.fma(a, b, c)


def polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Horner's rule by fma; highest power first. x is repeated: pass a variable."""
    value = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        value = fma(value, x, constant(coefficient, x))
    return value


def clamp(x: Expr, low: float, high: float) -> Expr:
    """x limited to [low, high]; NaN stays NaN (tirx.max and tirx.min would lose it). x is repeated."""
    names = _Names()
    above = names(tirx.Select(x < constant(low, x), constant(low, x), x))
    return names.close(tirx.Select(above > constant(high, x), constant(high, x), above))


def _exp_parts(names: _Names, x: Expr) -> tuple[Any, Any]:
    """(n as int32, exp(r) - 1) with x = n * ln 2 + r and |r| <= ln(2)/2, for |x| < 2^21."""
    shifted = names(fma(x, constant(math.log2(math.e), x), constant(_MAGIC, x)))
    n = names(shifted - constant(_MAGIC, x))
    high = names(fma(n, constant(-_LN2_HIGH, x), x))
    r = names(fma(n, constant(-_LN2_LOW, x), high))
    tail = names(polynomial(_EXP, r) * r)
    exponent = names(_bits(shifted, "int32") - _typed(0x4B400000, "int32", x))
    return exponent, names(fma(tail, r, r))


def _power_of_two(n: Expr) -> Expr:
    """2^n as float32 for int32 n in [-126, 127]."""
    return _bits((n + _typed(127, "int32", n)) << _typed(23, "int32", n), "float32")


def exp(x: Expr) -> Expr:
    """e^x, at most 1 ulp; subnormal results too. Cephes expf: |r| <= ln(2)/2 and a polynomial of degree 7."""
    names = _Names()
    limited = names(clamp(names(x), -104.0, 89.0))
    n, fraction = _exp_parts(names, limited)
    # In two steps: 2^n alone leaves the range of normal floats where the result overflows or is subnormal. The first
    # half of n is added to the exponent of a float in [0.7, 1.42], the rest is multiplied in and rounds once.
    half = names((n >> _typed(1, "int32", n)) << _typed(23, "int32", n))
    rest = (n << _typed(23, "int32", n)) - half + _typed(0x3F800000, "int32", n)
    value = _bits(fraction + constant(1.0, x), "int32") + half
    return names.close(_bits(value, "float32") * _bits(rest, "float32"))


def exp_below(x: Expr) -> Expr:
    """e^x for x <= 0 with the bits of `exp`, but 0 where it is below 2^-126: fewer operations."""
    names = _Names()
    x = names(x)
    n, fraction = _exp_parts(names, x)
    value = (fraction + constant(1.0, x)) * _power_of_two(n)
    return names.close(tirx.Select(x < constant(_EXP_LEAST, x), constant(0.0, x), value))


def expm1(x: Expr) -> Expr:
    """e^x - 1 without cancellation near 0, at most 2 ulp."""
    names = _Names()
    limited = names(clamp(names(x), -20.0, 89.0))
    n, fraction = _exp_parts(names, limited)
    # 2^(n-1) and a doubling at the end: 2^128 is no float32 although e^x may still be one.
    scale = names(_power_of_two(n - _typed(1, "int32", n)))
    half = fma(scale, fraction, scale - constant(0.5, x))
    return names.close(tirx.Select(limited == constant(0.0, x), limited, half + half))


def _log_normal(names: _Names, x: Expr, offset: Expr) -> Expr:
    """log(x) + offset * ln 2 for positive normal finite x. Cephes logf."""
    half_bits = 0x3F3504F3  # the bits of sqrt(1/2)
    biased = names(_bits(x, "int32") - _typed(half_bits, "int32", x))
    exponent = biased >> _typed(23, "int32", x)
    mantissa = (biased & _typed(0x7FFFFF, "int32", x)) + _typed(half_bits, "int32", x)
    e = names(tirx.Cast("float32" + _lanes(x), exponent) + offset)
    f = names(_bits(mantissa, "float32") - constant(1.0, x))
    square = names(f * f)
    correction = names(fma(e, constant(_LN2_LOW, x), polynomial(_LOG, f) * f * square))
    small = fma(constant(-0.5, x), square, correction)
    return fma(e, constant(_LN2_HIGH, x), f + small)


def log(x: Expr) -> Expr:
    """Natural logarithm, at most 2 ulp; subnormal x too, -inf at 0, NaN below. Cephes logf."""
    names = _Names()
    x = names(x)
    tiny = x < constant(1.1754943508222875e-38, x)
    scaled = names(tirx.Select(tiny, x * constant(33554432.0, x), x))
    value = _log_normal(names, scaled, tirx.Select(tiny, constant(-25.0, x), constant(0.0, x)))
    infinite = constant(math.inf, x)
    value = tirx.Select(x < infinite, value, x)  # +inf and NaN
    value = tirx.Select(x < constant(0.0, x), constant(math.nan, x), value)
    return names.close(tirx.Select(x == constant(0.0, x), constant(-math.inf, x), value))


def log1p(x: Expr) -> Expr:
    """log(1 + x) without cancellation near 0, at most 3 ulp: log(u) * x / (u - 1), u = 1 + x (Kahan)."""
    names = _Names()
    x = names(x)
    u = names(x + constant(1.0, x))
    rest = names(u - constant(1.0, x))
    value = log(u) * (x / tirx.Select(rest == constant(0.0, x), constant(1.0, x), rest))
    same = tirx.Select(x < constant(math.inf, x), value, x)
    return names.close(tirx.Select(rest == constant(0.0, x), x, tirx.Select(u > constant(0.0, x), same, log(u))))


def _exp_normal(names: _Names, x: Expr) -> Expr:
    """e^x for x in [-87, 88], where 2^n is a normal float; NaN stays NaN."""
    n, fraction = _exp_parts(names, x)
    return (fraction + constant(1.0, x)) * _power_of_two(n)


def _with_sign(size: Expr, sign: Expr) -> Expr:
    """size (not negative) with the sign bit of `sign`."""
    sign_bit = _bits(sign, "int32") & _typed(-0x80000000, "int32", sign)
    return _bits(_bits(size, "int32") | sign_bit, "float32")


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent, at most 2 ulp. Cephes: a polynomial below 0.625, 1 - 2 / (e^2|x| + 1) above."""
    names = _Names()
    x = names(x)
    square = names(x * x)
    size = names(tir_op.abs(x))
    small = fma(polynomial(_TANH, square) * square, size, size)
    one, limit = constant(1.0, x), constant(10.0, x)
    doubled = names(tirx.Select(size > limit, limit, size) * constant(2.0, x))
    large = one - constant(2.0, x) / (_exp_normal(names, doubled) + one)
    return names.close(_with_sign(tirx.Select(size < constant(_TANH_SMALL, x), small, large), x))


def erf(x: Expr) -> Expr:
    """Error function, at most 2 ulp: x + x * P(x^2) below 0.92, 1 - e^-R(|x|) above."""
    names = _Names()
    x = names(x)
    size = names(tir_op.abs(x))
    small = fma(polynomial(_ERF, names(x * x)), size, size)
    limited = names(tirx.Select(size > constant(4.0, x), constant(4.0, x), size))
    large = constant(1.0, x) - _exp_normal(names, names(-polynomial(_ERFC, limited)))
    return names.close(_with_sign(tirx.Select(size < constant(_ERF_SMALL, x), small, large), x))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), at most 3 ulp, 0 below -88.7."""
    return constant(1.0, x) / (constant(1.0, x) + exp(-x))


def softplus(x: Expr) -> Expr:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), at most 4 ulp."""
    names = _Names()
    x = names(x)
    positive = tirx.Select(x < constant(0.0, x), constant(0.0, x), x)
    return names.close(positive + log1p(exp(-tir_op.abs(x))))


def gelu(x: Expr) -> Expr:
    """x * (1 + erf(x / sqrt 2)) / 2."""
    names = _Names()
    x = names(x)
    half = names(x * constant(0.5, x))
    return names.close(fma(half, erf(x * constant(math.sqrt(0.5), x)), half))


def gelu_tanh(x: Expr) -> Expr:
    """The approximate GELU: x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2."""
    names = _Names()
    x = names(x)
    scale = math.sqrt(2.0 / math.pi)
    inner = fma(names(x * x), constant(scale * 0.044715, x), constant(scale, x))
    half = names(x * constant(0.5, x))
    return names.close(fma(half, tanh(x * inner), half))


def silu(x: Expr) -> Expr:
    """x * sigmoid(x)."""
    names = _Names()
    x = names(x)
    return names.close(x / (constant(1.0, x) + exp(-x)))


def _log2_float64(names: _Names, x: Expr) -> Expr:
    """log2 of a positive finite float32 as float64, relative error below 1e-12 (atanh series of (m-1)/(m+1))."""
    wide = _bits(tirx.Cast("float64" + _lanes(x), x), "int64")
    half_bits = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
    biased = names(wide - _typed(half_bits, "int64", x))
    mantissa = (biased & _typed(0xFFFFFFFFFFFFF, "int64", x)) + _typed(half_bits, "int64", x)
    magic_bits = _typed(0x4338000000000000, "int64", x)
    # An integer added to the bits of the magic number is that integer added to its value.
    exponent = _bits((biased >> _typed(52, "int64", x)) + magic_bits, "float64") - _typed(_MAGIC64, "float64", x)
    m = names(_bits(mantissa, "float64"))
    one = _typed(1.0, "float64", x)
    s = names((m - one) / (m + one))
    square = names(s * s)
    series = _typed(1.0 / 17.0, "float64", x)
    for odd in range(15, 0, -2):
        series = fma(series, square, _typed(1.0 / odd, "float64", x))
    return fma(series, s * _typed(2.0 * math.log2(math.e), "float64", x), exponent)


def _exp2_float64(names: _Names, t: Expr, like: Expr) -> Expr:
    """2^t rounded once to float32, for float64 t (infinite or NaN too)."""
    low, high = _typed(-160.0, "float64", like), _typed(130.0, "float64", like)
    above = names(tirx.Select(t < low, low, t))
    t = names(tirx.Select(above > high, high, above))
    magic = _typed(_MAGIC64, "float64", like)
    shifted = names(t + magic)
    r = names((t - (shifted - magic)) * _typed(math.log(2.0), "float64", like))
    value = _typed(1.0 / math.factorial(10), "float64", like)
    for power in range(9, -1, -1):
        value = fma(value, r, _typed(1.0 / math.factorial(power), "float64", like))
    # The low bits of the shifted value hold n: moved to the exponent field they leave the magic number's behind.
    scale = (_bits(shifted, "int64") + _typed(1023, "int64", like)) << _typed(52, "int64", like)
    return tirx.Cast("float32" + _lanes(like), value * _bits(scale, "float64"))


def pow(x: Expr, y: Expr) -> Expr:
    """x^y with the special cases of IEEE 754 pow, at most 1 ulp (inside in float64)."""
    names = _Names()
    x, y = names(x), names(y)
    zero, one, infinite = constant(0.0, x), constant(1.0, x), constant(math.inf, x)
    size = names(tir_op.abs(x))
    usable = names(tirx.Select(size < infinite, tirx.Select(size == zero, one, size), one))
    logarithm = _log2_float64(names, usable)
    special = tirx.Select(size == zero, constant(-math.inf, x), size)
    wide = "float64" + _lanes(x)
    ordinary = tirx.And(size > zero, size < infinite)
    exponent = tirx.Select(ordinary, logarithm, tirx.Cast(wide, special))
    # A finite stand-in for an infinite y: x = 1 gives 0 * y = 0, every other x overflows all the same.
    finite = clamp(y, -1e30, 1e30)
    magnitude = names(_exp2_float64(names, names(exponent * tirx.Cast(wide, finite)), x))
    integral = tir_op.floor(y) == y
    half = y * constant(0.5, x)
    odd = tirx.And(integral, tir_op.floor(half) != half)
    negative = _bits(x, "int32") < _typed(0, "int32", x)
    value = tirx.Select(tirx.And(negative, odd), -magnitude, magnitude)
    undefined = tirx.And(tirx.And(x < zero, x > constant(-math.inf, x)), tirx.Not(integral))
    value = tirx.Select(undefined, constant(math.nan, x), value)
    return names.close(tirx.Select(tirx.Or(y == zero, x == one), one, value))


def _trigonometric(x: Expr, quarter: int) -> Expr:
    """sin(x + quarter * pi/2): reduction in float64 by fma, so it is exact up to |x| = 2^50; NaN beyond."""
    names = _Names()
    x = names(x)
    wide = names(tirx.Cast("float64" + _lanes(x), x))
    magic = _typed(_MAGIC64, "float64", x)
    shifted = names(fma(wide, _typed(2.0 / math.pi, "float64", x), magic))
    n = names(shifted - magic)
    partial = names(fma(n, _typed(-_HALF_PI_HIGH, "float64", x), wide))
    reduced = fma(n, _typed(-_HALF_PI_LOW, "float64", x), partial)
    r = names(tirx.Cast("float32" + _lanes(x), reduced))
    turn = names(tirx.Cast("int32" + _lanes(x), _bits(shifted, "int64")) + _typed(quarter, "int32", x))
    square = names(r * r)
    sine = tirx.Select(r == constant(0.0, x), r, fma(polynomial(_SIN, square) * square, r, r))
    cosine = fma(polynomial(_COS, square), square * square, fma(constant(-0.5, x), square, constant(1.0, x)))
    odd = (turn & _typed(1, "int32", x)) == _typed(0, "int32", x)
    value = names(tirx.Select(odd, sine, cosine))
    signed = tirx.Select((turn & _typed(2, "int32", x)) == _typed(0, "int32", x), value, -value)
    inside = tir_op.abs(x) < constant(_TRIGONOMETRIC_LIMIT, x)
    return names.close(tirx.Select(inside, signed, constant(math.nan, x)))


def sin(x: Expr) -> Expr:
    """Sine, at most 2 ulp up to |x| = 2^50 and NaN beyond, where neighbouring floats are millions of periods apart."""
    return _trigonometric(x, 0)


def cos(x: Expr) -> Expr:
    """Cosine, at most 2 ulp up to |x| = 2^50 and NaN beyond."""
    return _trigonometric(x, 1)


def tan(x: Expr) -> Expr:
    """Tangent, at most 4 ulp up to |x| = 2^50 and NaN beyond."""
    names = _Names()
    x = names(x)
    return names.close(sin(x) / cos(x))


def atan(x: Expr) -> Expr:
    """Arc tangent, at most 3 ulp. Cephes: reduced to |x| <= tan(pi/8) through pi/4 and pi/2."""
    names = _Names()
    x = names(x)
    size = names(tir_op.abs(x))
    one = constant(1.0, x)
    far, middle = size > constant(math.tan(3 * math.pi / 8), x), size > constant(math.tan(math.pi / 8), x)
    top = tirx.Select(far, -one, tirx.Select(middle, size - one, size))
    bottom = tirx.Select(far, size, tirx.Select(middle, size + one, one))
    turn = tirx.Select(far, constant(math.pi / 2, x), tirx.Select(middle, constant(math.pi / 4, x), constant(0.0, x)))
    r = names(top / bottom)
    square = names(r * r)
    return names.close(_with_sign(turn + fma(polynomial(_ATAN, square) * square, r, r), x))


def _arc_sine_parts(names: _Names, x: Expr) -> tuple[Expr, Any, Any]:
    """(asin(r), |x|, r) with r = |x| up to 1/2 and r = sqrt((1 - |x|) / 2) above. Cephes asinf."""
    size = names(tir_op.abs(x))
    half = constant(0.5, x)
    square = names(tirx.Select(size > half, (constant(1.0, x) - size) * half, size * size))
    r = names(tirx.Select(size > half, tir_op.sqrt(square), size))
    return names(fma(polynomial(_ASIN, square) * square, r, r)), size, r


def asin(x: Expr) -> Expr:
    """Arc sine, at most 4 ulp; NaN outside [-1, 1]."""
    names = _Names()
    x = names(x)
    arc, size, _ = _arc_sine_parts(names, x)
    value = tirx.Select(size > constant(0.5, x), constant(math.pi / 2, x) - (arc + arc), arc)
    return names.close(_with_sign(value, x))


def acos(x: Expr) -> Expr:
    """Arc cosine, at most 4 ulp; NaN outside [-1, 1]."""
    names = _Names()
    x = names(x)
    arc, size, _ = _arc_sine_parts(names, x)
    inner = constant(math.pi / 2, x) - _with_sign(arc, x)
    outer = tirx.Select(x < constant(0.0, x), constant(math.pi, x) - (arc + arc), arc + arc)
    return names.close(tirx.Select(size > constant(0.5, x), outer, inner))


def _half_exp(names: _Names, size: Expr) -> Expr:
    """e^size / 2 for size >= 0, finite as long as the result is: (e^(size/2))^2 / 2 would double the error."""
    limited = names(tirx.Select(size > constant(90.0, size), constant(90.0, size), size))
    n, fraction = _exp_parts(names, limited)
    # 2^(n-2) and a doubling: up to the overflow of sinh and cosh at 89.4, n - 1 = 128 is no exponent of a float32.
    quarter = names((fraction + constant(1.0, size)) * _power_of_two(n - _typed(2, "int32", size)))
    return names(quarter + quarter)


def sinh(x: Expr) -> Expr:
    """Hyperbolic sine, at most 4 ulp."""
    names = _Names()
    x = names(x)
    size = names(tir_op.abs(x))
    half = _half_exp(names, size)
    square = names(x * x)
    small = fma(polynomial(_SINH, square) * square, size, size)
    large = half - constant(0.25, x) / half
    return names.close(_with_sign(tirx.Select(size < constant(1.0, x), small, large), x))


def cosh(x: Expr) -> Expr:
    """Hyperbolic cosine, at most 4 ulp."""
    names = _Names()
    half = _half_exp(names, names(tir_op.abs(x)))
    return names.close(half + constant(0.25, x) / half)


def asinh(x: Expr) -> Expr:
    """Inverse hyperbolic sine, at most 5 ulp: log1p(|x| + x^2 / (1 + sqrt(1 + x^2))), log 2|x| where x^2 is large."""
    names = _Names()
    x = names(x)
    size = names(tir_op.abs(x))
    one = constant(1.0, x)
    large = size > constant(1e8, x)
    near = names(tirx.Select(large, one, size))
    square = names(near * near)
    inner = near + square / (one + tir_op.sqrt(one + square))
    far = log(tirx.Select(large, size, one)) + constant(math.log(2.0), x)
    return names.close(_with_sign(tirx.Select(large, far, log1p(inner)), x))


def acosh(x: Expr) -> Expr:
    """Inverse hyperbolic cosine, at most 5 ulp; NaN below 1: log1p(t + sqrt(2 t + t^2)), t = x - 1."""
    names = _Names()
    x = names(x)
    one = constant(1.0, x)
    large = x > constant(1e8, x)
    t = names(tirx.Select(large, one, x - one))
    near = log1p(t + tir_op.sqrt(fma(t, t, t + t)))
    far = log(tirx.Select(large, x, one)) + constant(math.log(2.0), x)
    value = tirx.Select(large, far, near)
    return names.close(tirx.Select(x < one, constant(math.nan, x), value))


def atanh(x: Expr) -> Expr:
    """Inverse hyperbolic tangent, at most 5 ulp; NaN outside [-1, 1]: log1p(2 |x| / (1 - |x|)) / 2."""
    names = _Names()
    x = names(x)
    size = names(tir_op.abs(x))
    value = constant(0.5, x) * log1p((size + size) / (constant(1.0, x) - size))
    return names.close(_with_sign(value, x))
