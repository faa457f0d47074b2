"""Operators that work element by element: arithmetic, comparisons, logic, Where, Cast, mathematical functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import attributes, dtypes, scalar
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.group import named
from kbitc.targets.lower.scalar import const, select
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Lazy, Value

Binary = Callable[[Expr, Expr], Expr]
Emit = Callable[[Context, ir.Node], Value]
# Expressions of more operations than this may hold functions such as log, whose parts are bound to variables.
FUNCTION_COST = 8


def unary(function: Callable[[Expr], Expr], cost: int = 1, dtype: str | None = None) -> Emit:
    """An emitter for a function of one operand."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        return elementwise(ctx, node, [attributes.value(ctx, node, 0)], function, dtype, cost)

    return emit


def binary(function: Binary, cost: int = 1, dtype: str | None = None) -> Emit:
    """An emitter for a function of two operands of one type."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        operands = [attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)]
        return elementwise(ctx, node, operands, function, dtype, cost)

    return emit


def variadic(function: Binary, mean: bool = False) -> Emit:
    """An emitter that folds any number of operands from the left."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        operands = [attributes.value(ctx, node, index) for index in range(len(node.inputs))]

        def fold(*items: Expr) -> Expr:
            total = items[0]
            for item in items[1:]:
                total = function(total, item)
            return total / const(len(items), total) if mean else total

        return elementwise(ctx, node, operands, fold, cost=len(operands))

    return emit


def divide(a: Expr, b: Expr) -> Expr:
    """ONNX Div: true for floats, towards zero for integers. Integer x / 0 is 0 here instead of a trap."""
    if dtypes.is_float(scalar.dtype_of(a)):
        return a / b
    return _guarded(a, b, tirx.truncdiv, lambda x: const(0, x) - x)


def _guarded(a: Expr, b: Expr, function: Binary, by_minus_one: Callable[[Expr], Expr]) -> Expr:
    """An integer division that neither 0 nor -1 (whose quotient may overflow) makes trap.

    Branches, not selections: a selection computes both sides, and tvm drops guards inside of them.
    """

    def safe(d: Expr) -> Expr:
        result = function(a, d)
        # tvm's analysis of conditions fails on unsigned numbers.
        signed = scalar.cast(d, "int64")
        if not scalar.dtype_of(a).startswith("uint"):
            result = tirx.if_then_else(signed == const(-1, signed), by_minus_one(a), result)
        return tirx.if_then_else(signed == const(0, signed), const(0, a), result)

    return named(b, safe)


def _floor_mod(a: Expr, b: Expr) -> Expr:
    """Sign of the divisor, as in Python."""
    return _guarded(a, b, tirx.floormod, lambda x: const(0, x))


def _truncated_mod(a: Expr, b: Expr) -> Expr:
    """Sign of the dividend, as in C."""
    if dtypes.is_float(scalar.dtype_of(a)):
        wide = "float32" if scalar.dtype_of(a) in ("float16", "bfloat16") else scalar.dtype_of(a)
        name = "fmod" if wide == "float64" else "fmodf"
        rest = tirx.call_pure_extern(wide, name, scalar.cast(a, wide), scalar.cast(b, wide))
        return scalar.cast(rest, scalar.dtype_of(a))
    return named(a, lambda x: x - divide(x, b) * b)


def mod(ctx: Context, node: ir.Node) -> Value:
    """Mod with fmod = 0 (integers, floor) or 1 (C)."""
    operands = [attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)]
    truncated = node.attributes.get_int("fmod", 0) == 1
    if dtypes.is_float(operands[0].dtype) and not truncated:
        raise refuse(node, "Mod of floats needs fmod = 1", remedy="repair the model")
    return elementwise(ctx, node, operands, _truncated_mod if truncated else _floor_mod, cost=6)


def pow_expression(x: Expr, y: Expr) -> Expr:
    """x^y in the type of x."""
    kind = scalar.dtype_of(x)
    if dtypes.is_float(kind):
        if isinstance(y, tirx.FloatImm | tirx.IntImm):
            simple = _simple_power(x, float(y.value))
            if simple is not None:
                return simple
        return _general_power(x, scalar.cast(y, kind), kind)
    if isinstance(y, tirx.IntImm) and 0 <= int(y.value) <= 4:
        return named(x, lambda v: _repeat(v, int(y.value)))
    wide = scalar.cast(x, "float64")
    return scalar.cast(tirx.power(wide, scalar.cast(y, "float64")), kind)


def _repeat(x: Expr, count: int) -> Expr:
    result = const(1, x)
    for step in range(count):
        result = x if step == 0 else result * x
    return result


def _simple_power(x: Expr, exponent: float) -> Expr | None:
    if exponent in (1.0, 2.0, 3.0, 4.0):
        return named(x, lambda v: _repeat(v, int(exponent)))
    if exponent == 0.5:
        # pow(-0, 0.5) is +0 where sqrt gives -0; adding 0 repairs that.
        return scalar.in_float32(tirx.sqrt)(x) + const(0.0, x)
    if exponent == -1.0:
        return const(1.0, x) / x
    return None


def _general_power(x: Expr, y: Expr, kind: str) -> Expr:
    from kbitc.targets.kernels import mathfn

    if kind == "float64":
        return tirx.power(x, y)
    wide = mathfn.pow(scalar.cast(x, "float32"), scalar.cast(y, "float32"))
    return scalar.cast(wide, kind)


def power(ctx: Context, node: ir.Node) -> Value:
    """Pow; base and exponent may differ in type."""
    operands = [attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)]
    cheap = isinstance(operands[1], Constant) and operands[1].array.size == 1
    return elementwise(ctx, node, operands, pow_expression, cost=3 if cheap else 30)


def where(ctx: Context, node: ir.Node) -> Value:
    """Where(condition, X, Y)."""
    operands = [attributes.value(ctx, node, index) for index in range(3)]
    return elementwise(ctx, node, operands, select, operands[1].dtype)


def convert(x: Expr, source: str, dtype: str) -> Expr:
    """ONNX Cast between types that are in memory."""
    if source == dtype:
        return x
    if dtype == "bool":
        return tirx.NE(x, const(0, x))
    if source == "bool":
        return tirx.Cast(dtype, x)
    if dtypes.is_float(source) and dtype in ("int8", "uint8", "int16", "uint16"):
        # Through int32, as onnxruntime's conversions do: the low bits survive on every target.
        return tirx.Cast(dtype, tirx.Cast("int32", x))
    if "bfloat16" in (source, dtype) and "float32" not in (source, dtype):
        return tirx.Cast(dtype, tirx.Cast("float32", x))
    return tirx.Cast(dtype, x)


def cast(ctx: Context, node: ir.Node) -> Value:
    """Cast and CastLike."""
    source = attributes.value(ctx, node, 0)
    if node.op_type == "CastLike":
        dtype = attributes.value(ctx, node, 1).dtype
    else:
        dtype = dtypes.tvm_type(ir.DataType(node.attributes.get_int("to", 0)), node.name or "Cast")
    if source.dtype != dtypes.storage(source.dtype) or dtype != dtypes.storage(dtype):
        raise refuse(node, "Cast from or to a type below 8 bits", got=f"{source.dtype} to {dtype}")
    to_integer = dtypes.is_float(source.dtype) and not dtypes.is_float(dtype)
    if to_integer and isinstance(source, Lazy) and source.cost > FUNCTION_COST:
        # TVM works out the bounds of integers, and contradicts itself about the variables that functions bind.
        source = ctx.tensor(source)
    return elementwise(ctx, node, [source], lambda x: convert(x, source.dtype, dtype), dtype)


def clip(ctx: Context, node: ir.Node) -> Value:
    """Clip with limits as inputs (opset 11) or attributes (opset 6)."""
    x = attributes.value(ctx, node, 0)
    low, high = attributes.optional(ctx, node, 1), attributes.optional(ctx, node, 2)
    if "min" in node.attributes or "max" in node.attributes:
        floor, ceiling = node.attributes.get_float("min"), node.attributes.get_float("max")

        def fixed(v: Expr) -> Expr:
            v = v if floor is None else scalar.maximum(v, const(floor, v))
            return v if ceiling is None else scalar.minimum(v, const(ceiling, v))

        return elementwise(ctx, node, [x], fixed, cost=2)

    def limited(v: Expr, *limits: Expr) -> Expr:
        rest = list(limits)
        v = v if low is None else scalar.maximum(v, rest.pop(0))
        return v if high is None else scalar.minimum(v, rest.pop(0))

    # Limits are scalars: they are made rank 0 so that they do not add dimensions.
    given = [ctx.reshape(limit, ()) for limit in (low, high) if limit is not None]
    return elementwise(ctx, node, [x, *given], limited, cost=2)


def shift(ctx: Context, node: ir.Node) -> Value:
    """BitShift of unsigned integers; a distance of the width or more gives 0."""
    left = node.attributes.get_string("direction", "") == "LEFT"
    operands = [attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)]
    bits = int("".join(char for char in operands[0].dtype if char.isdigit()))

    def function(x: Expr, distance: Expr) -> Expr:
        # tvm's analysis of conditions fails on unsigned numbers.
        signed = scalar.cast(distance, "int64")
        inside = tirx.And(signed >= const(0, signed), signed < const(bits, signed))
        return select(inside, (x << distance) if left else (x >> distance), const(0, x))

    return elementwise(ctx, node, operands, function, cost=3)


def is_infinite(ctx: Context, node: ir.Node) -> Value:
    """IsInf, both signs or one."""
    positive = node.attributes.get_int("detect_positive", 1) == 1
    negative = node.attributes.get_int("detect_negative", 1) == 1

    def function(x: Expr) -> Expr:
        wide = scalar.cast(x, "float32") if scalar.dtype_of(x) in ("float16", "bfloat16") else x
        plus = wide == tirx.const(float("inf"), scalar.dtype_of(wide))
        minus = wide == tirx.const(float("-inf"), scalar.dtype_of(wide))
        if positive and negative:
            return tirx.Or(plus, minus)
        if positive or negative:
            return plus if positive else minus
        return tirx.const(False, "bool")

    return elementwise(ctx, node, [attributes.value(ctx, node, 0)], function, "bool", 2)


def identity(ctx: Context, node: ir.Node) -> Value:
    """The operand itself."""
    return attributes.value(ctx, node, 0)


def dropout(ctx: Context, node: ir.Node) -> Any:
    """Dropout at inference: the operand, and a mask of ones."""
    training = attributes.known(ctx, node, 2, "training_mode")
    if training is not None and bool(training.reshape(-1)[0]):
        raise refuse(node, "Dropout in training mode", remedy="export the model for inference")
    x = attributes.value(ctx, node, 0)
    mask = elementwise(ctx, node, [x], lambda v: tirx.const(True, "bool"), "bool")
    return [x, mask]


def sign(x: Expr) -> Expr:
    """-1, 0 or 1; NaN stays."""
    zero, one = const(0, x), const(1, x)
    if scalar.dtype_of(x).startswith("uint"):
        return named(x, lambda v: select(v > zero, one, zero))
    return named(x, lambda v: select(v > zero, one, select(v < zero, zero - one, v)))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed in float32 where its operands are 16-bit floats."""

    def wide(*items: Expr) -> Expr:
        kind = scalar.dtype_of(items[0])
        if kind not in ("float16", "bfloat16"):
            return function(*items)
        return scalar.cast(function(*(scalar.cast(item, "float32") for item in items)), kind)

    return wide


def _compare(function: Binary) -> Binary:
    def wide(a: Expr, b: Expr) -> Expr:
        if scalar.dtype_of(a) in ("float16", "bfloat16"):
            return function(scalar.cast(a, "float32"), scalar.cast(b, "float32"))
        return function(a, b)

    return wide


def _equal(a: Expr, b: Expr) -> Expr:
    return tirx.EQ(a, b)


def _negate(x: Expr) -> Expr:
    return -x if dtypes.is_float(scalar.dtype_of(x)) else const(0, x) - x


def _absolute(x: Expr) -> Expr:
    return x if scalar.dtype_of(x).startswith("uint") else _plain(tirx.abs)(x)


def _integral(function: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    return scalar.in_float32(function)


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "Identity": identity,
    "Dropout": dropout,
    "Add": binary(_plain(lambda a, b: a + b)),
    "Sub": binary(_plain(lambda a, b: a - b)),
    "Mul": binary(_plain(lambda a, b: a * b)),
    "Div": binary(_plain(divide), cost=3),
    "Sum": variadic(lambda a, b: a + b),
    "Mean": variadic(lambda a, b: a + b, mean=True),
    "Max": variadic(_plain(scalar.maximum)),
    "Min": variadic(_plain(scalar.minimum)),
    "Mod": mod,
    "Pow": power,
    "Equal": binary(_compare(_equal), dtype="bool"),
    "Less": binary(_compare(lambda a, b: a < b), dtype="bool"),
    "LessOrEqual": binary(_compare(lambda a, b: a <= b), dtype="bool"),
    "Greater": binary(_compare(lambda a, b: a > b), dtype="bool"),
    "GreaterOrEqual": binary(_compare(lambda a, b: a >= b), dtype="bool"),
    "And": binary(tirx.And, dtype="bool"),
    "Or": binary(tirx.Or, dtype="bool"),
    "Xor": binary(lambda a, b: tirx.NE(tirx.Cast("int8", a), tirx.Cast("int8", b)), dtype="bool"),
    "Not": unary(lambda x: tirx.Not(x)),
    "BitwiseAnd": binary(lambda a, b: a & b),
    "BitwiseOr": binary(lambda a, b: a | b),
    "BitwiseXor": binary(lambda a, b: a ^ b),
    "BitwiseNot": unary(lambda x: ~x),
    "BitShift": shift,
    "Where": where,
    "Cast": cast,
    "CastLike": cast,
    "Clip": clip,
    "Neg": unary(_negate),
    "Abs": unary(_absolute),
    "Sign": unary(_plain(sign), cost=2),
    "Reciprocal": unary(_plain(lambda x: const(1.0, x) / x), cost=3),
    "Sqrt": unary(_integral(tirx.sqrt), cost=4),
    "Exp": unary(scalar.exp, cost=12),
    "Log": unary(scalar.log, cost=14),
    "Erf": unary(scalar.erf, cost=16),
    "Floor": unary(_integral(tirx.floor)),
    "Ceil": unary(_integral(tirx.ceil)),
    "Round": unary(scalar.round_even),
    "IsNaN": unary(scalar.is_nan, dtype="bool", cost=2),
    "IsInf": is_infinite,
    **{
        name: unary(scalar.function(name.lower()), cost=30)
        for name in ("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")
    },
}
