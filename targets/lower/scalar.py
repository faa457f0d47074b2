"""Scalar functions on expressions of any element type.

float32 goes to the polynomials of `kbitc.targets.kernels.mathfn`, which give the same results on every target;
16-bit floats are computed in float32 and rounded once; float64 uses the mathematics library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from kbitc.targets.kernels import mathfn
from kbitc.targets.lower import dtypes
from kbitc.targets.lower.group import named
from kbitc.targets.lower.values import Expr

Unary = Callable[[Expr], Expr]
# 1.5 * 2^23 and its bits: float32 numbers from 2^23 to 2^24 are the integers.
ROUNDING = 3 << 22
ROUNDING_BITS = 0x4B400000
# Functions for which tvm has no polynomial of ours: tirx intrinsics (calls into libm on CPUs).
_INTRINSICS: dict[str, Any] = {
    name: getattr(tirx, name)
    for name in (
        *("exp", "log", "tanh", "erf", "sigmoid", "sin", "cos", "tan", "asin", "acos", "atan"),
        *("sinh", "cosh", "asinh", "acosh", "atanh", "sqrt", "floor", "ceil", "log1p"),
    )
}


def dtype_of(x: Expr) -> str:
    """The type name of a scalar expression."""
    return str(x.ty.dtype)


def const(value: float | int | bool, x: Expr) -> Expr:
    """A number of the type of x."""
    return tirx.const(value, dtype_of(x))


def cast(x: Expr, dtype: str) -> Expr:
    """Plain numeric conversion."""
    return x if dtype_of(x) == dtype else tirx.Cast(dtype, x)


def in_float32(function: Unary) -> Unary:
    """The function computed in float32 where its operand is a 16-bit float."""

    def wide(x: Expr) -> Expr:
        kind = dtype_of(x)
        if kind in ("float16", "bfloat16"):
            return cast(function(cast(x, "float32")), kind)
        return function(x)

    return wide


def function(name: str) -> Unary:
    """The named function: mathfn's where it has one and the operand is float32, otherwise tvm's intrinsic."""
    ours = getattr(mathfn, name, None)
    library = _INTRINSICS.get(name)

    def apply(x: Expr) -> Expr:
        if ours is not None and dtype_of(x) == "float32":
            return named(x, ours)
        if library is None:
            raise ValueError(f"no scalar function {name} for {dtype_of(x)}")
        return library(x)

    return in_float32(apply)


exp = function("exp")
log = function("log")
tanh = function("tanh")
erf = function("erf")
sigmoid = function("sigmoid")


def exp_below(x: Expr) -> Expr:
    """e^x for x <= 0; of float32, results below 2^-126 may be 0."""
    return named(x, mathfn.exp_below) if dtype_of(x) == "float32" else exp(x)


def expm1(x: Expr) -> Expr:
    """e^x - 1."""
    if dtype_of(x) == "float32" and hasattr(mathfn, "expm1"):
        return named(x, mathfn.expm1)
    return exp(x) - const(1.0, x)


def log1p(x: Expr) -> Expr:
    """log(1 + x)."""
    if dtype_of(x) == "float32" and hasattr(mathfn, "log1p"):
        return named(x, mathfn.log1p)
    return _INTRINSICS["log1p"](x) if dtype_of(x) == "float64" else in_float32(lambda v: log(const(1.0, v) + v))(x)


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """Either of two values that may both be computed."""
    return tirx.Select(condition, yes, no)


def is_nan(x: Expr) -> Expr:
    """Whether a float is NaN, told from its bits: tvm's simplifier takes x != x for false."""
    if dtype_of(x) in ("float16", "bfloat16"):
        x = cast(x, "float32")
    integer, magnitude, infinity = {
        "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
        "float64": ("int64", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    }[dtype_of(x)]
    return (tirx.reinterpret(integer, x) & tirx.const(magnitude, integer)) > tirx.const(infinity, integer)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger; NaN when either is NaN, as in ONNX."""
    return _extreme(a, b, tirx.max, lambda x, y: x < y)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller; NaN when either is NaN, as in ONNX."""
    return _extreme(a, b, tirx.min, lambda x, y: x > y)


def _extreme(a: Expr, b: Expr, plain: Any, worse: Callable[[Expr, Expr], Expr]) -> Expr:
    if not dtypes.is_float(dtype_of(a)):
        return plain(a, b)
    if isinstance(b, tirx.FloatImm):
        return named(a, lambda x: select(worse(x, b), b, x))
    return named(a, lambda x: named(b, lambda y: select(tirx.Or(worse(x, y), is_nan(y)), y, x)))


def round_even(x: Expr) -> Expr:
    """The nearest integer, half to even."""
    return in_float32(tirx.nearbyint)(x)


def saturate(x: Expr, dtype: str, low: int, high: int) -> Expr:
    """A float that holds an integer, limited to [low, high] and converted. NaN becomes low."""
    limited = tirx.max(tirx.min(x, const(float(high), x)), const(float(low), x))
    return tirx.Cast(dtype, tirx.Cast("int32", limited))


def rounded_code(x: Expr, zero_point: Expr | None, dtype: str, low: int, high: int) -> Expr:
    """saturate(round half to even(x) + zero point), in vector operations only: tvm does not make vectors of nearbyint.

    x + 1.5 * 2^23 has no bits left for a fraction, so that the addition itself rounds, and its lowest bits are the
    integer. x is limited to +-2^21 before, far outside of every range here.

    Args:
        x: float32.
        zero_point: int32 in low..high, or None.
        dtype: of the result.
        low, high: range of the codes, inside +-2^20.
    """
    if max(abs(low), abs(high)) > 1 << 20:
        rounded = tirx.nearbyint(x)
        moved = rounded if zero_point is None else rounded + tirx.Cast("float32", zero_point)
        return saturate(moved, dtype, low, high)
    limit = float(1 << 21)
    limited = tirx.max(tirx.min(x, const(limit, x)), const(-limit, x))
    code = tirx.reinterpret("int32", limited + const(float(ROUNDING), x)) - tirx.const(ROUNDING_BITS, "int32")
    moved = code if zero_point is None else code + zero_point
    return tirx.Cast(dtype, tirx.max(tirx.min(moved, tirx.const(high, "int32")), tirx.const(low, "int32")))
