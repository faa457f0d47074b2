"""Activation functions, each in the formula of the ONNX operator's own definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.kernels import mathfn
from kbitc.targets.lower import attributes, scalar
from kbitc.targets.lower.attributes import float_attribute
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.group import named
from kbitc.targets.lower.ops.elementwise import unary
from kbitc.targets.lower.scalar import const, select
from kbitc.targets.lower.values import Expr, Value

SELU_ALPHA = 1.67326319217681884765625
SELU_GAMMA = 1.05070102214813232421875


def _float(ctx: Context, node: ir.Node, function: Callable[[Expr], Expr], cost: int) -> Value:
    """One float function, computed in float32 for 16-bit floats, its operand named."""
    x = attributes.value(ctx, node, 0)
    return elementwise(ctx, node, [x], lambda v: scalar.in_float32(lambda w: named(w, function))(v), cost=cost)


def relu(ctx: Context, node: ir.Node) -> Value:
    """max(x, 0)."""
    x = attributes.value(ctx, node, 0)
    return elementwise(ctx, node, [x], lambda v: scalar.maximum(v, const(0, v)))


def leaky_relu(ctx: Context, node: ir.Node) -> Value:
    """x where x >= 0, otherwise alpha * x."""
    alpha = float_attribute(node, "alpha", 0.01)
    return _float(ctx, node, lambda x: select(x < const(0.0, x), x * const(alpha, x), x), 2)


def thresholded_relu(ctx: Context, node: ir.Node) -> Value:
    """x where x > alpha, otherwise 0."""
    alpha = float_attribute(node, "alpha", 1.0)
    return _float(ctx, node, lambda x: select(x > const(alpha, x), x, const(0.0, x)), 2)


def parametric_relu(ctx: Context, node: ir.Node) -> Value:
    """x where x >= 0, otherwise slope * x; the slope broadcasts to x."""
    operands = [attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)]
    return elementwise(ctx, node, operands, lambda x, s: named(x, lambda v: select(v < const(0, v), v * s, v)), cost=2)


def elu(ctx: Context, node: ir.Node) -> Value:
    """x where x >= 0, otherwise alpha * (e^x - 1)."""
    alpha = float_attribute(node, "alpha", 1.0)
    return _float(ctx, node, lambda x: select(x < const(0.0, x), const(alpha, x) * scalar.expm1(x), x), 16)


def selu(ctx: Context, node: ir.Node) -> Value:
    """gamma * x where x > 0, otherwise gamma * alpha * (e^x - 1)."""
    alpha, gamma = float_attribute(node, "alpha", SELU_ALPHA), float_attribute(node, "gamma", SELU_GAMMA)

    def function(x: Expr) -> Expr:
        return const(gamma, x) * select(x > const(0.0, x), x, const(alpha, x) * scalar.expm1(x))

    return _float(ctx, node, function, 16)


def celu(ctx: Context, node: ir.Node) -> Value:
    """max(0, x) + min(0, alpha * (e^(x / alpha) - 1))."""
    alpha = float_attribute(node, "alpha", 1.0)

    def function(x: Expr) -> Expr:
        return select(x < const(0.0, x), const(alpha, x) * scalar.expm1(x / const(alpha, x)), x)

    return _float(ctx, node, function, 18)


def gelu(ctx: Context, node: ir.Node) -> Value:
    """GELU by erf, or its tanh approximation."""
    approximate = node.attributes.get_string("approximate", "none") == "tanh"

    def function(x: Expr) -> Expr:
        if scalar.dtype_of(x) == "float32":
            return mathfn.gelu_tanh(x) if approximate else mathfn.gelu(x)
        if approximate:
            inner = const(0.7978845608028654, x) * (x + const(0.044715, x) * x * x * x)
            return const(0.5, x) * x * (const(1.0, x) + scalar.tanh(inner))
        return const(0.5, x) * x * (const(1.0, x) + scalar.erf(x * const(0.7071067811865476, x)))

    return _float(ctx, node, function, 20)


def _bounded_line(x: Expr, alpha: float, beta: float) -> Expr:
    line = x * const(alpha, x) + const(beta, x)
    return scalar.minimum(scalar.maximum(line, const(0.0, x)), const(1.0, x))


def hard_sigmoid(ctx: Context, node: ir.Node) -> Value:
    """max(0, min(1, alpha * x + beta))."""
    alpha, beta = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    return _float(ctx, node, lambda x: _bounded_line(x, alpha, beta), 4)


def hard_swish(ctx: Context, node: ir.Node) -> Value:
    """x * max(0, min(1, x / 6 + 1/2))."""
    return _float(ctx, node, lambda x: x * _bounded_line(x, 1.0 / 6.0, 0.5), 5)


def _softplus(x: Expr) -> Expr:
    if scalar.dtype_of(x) == "float32":
        return mathfn.softplus(x)
    return tirx.max(x, const(0.0, x)) + scalar.log1p(scalar.exp(-tirx.abs(x)))


def swish(ctx: Context, node: ir.Node) -> Value:
    """x * sigmoid(alpha * x)."""
    alpha = float_attribute(node, "alpha", 1.0)
    return _float(ctx, node, lambda x: x * scalar.sigmoid(x * const(alpha, x)), 18)


def shrink(ctx: Context, node: ir.Node) -> Value:
    """x + bias below -lambd, x - bias above lambd, otherwise 0."""
    bias, limit = float_attribute(node, "bias", 0.0), float_attribute(node, "lambd", 0.5)

    def function(x: Expr) -> Expr:
        if scalar.dtype_of(x) not in ("float32", "float64"):
            return x
        upper = select(x > const(limit, x), x - const(bias, x), const(0.0, x))
        return select(x < const(-limit, x), x + const(bias, x), upper)

    return _float(ctx, node, function, 4)


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "Relu": relu,
    "LeakyRelu": leaky_relu,
    "ThresholdedRelu": thresholded_relu,
    "PRelu": parametric_relu,
    "Elu": elu,
    "Selu": selu,
    "Celu": celu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Sigmoid": unary(scalar.sigmoid, cost=16),
    "Tanh": unary(scalar.tanh, cost=16),
    "Softplus": unary(scalar.in_float32(lambda x: named(x, _softplus)), cost=26),
    "Softsign": unary(scalar.in_float32(lambda x: named(x, lambda v: v / (const(1.0, v) + tirx.abs(v)))), cost=5),
    "Mish": unary(scalar.in_float32(lambda x: named(x, lambda v: v * scalar.tanh(_softplus(v)))), cost=40),
    "Swish": swish,
    "Shrink": shrink,
}
