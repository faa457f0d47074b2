"""The functions of kbitc in integer graphs, apart from products: requantization, sums, products, tables, levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from kbitc.graph import edit, integer_functions
from kbitc.graph.integer_functions import BLOCK_LEVELS, INTEGER_ADD, INTEGER_MUL, INTEGER_PRELU, LEVELS, REQUANTIZE
from kbitc.graph.integer_functions import TABLE as LOOK_UP
from kbitc.targets.lower import attributes
from kbitc.targets.lower.attributes import axis_of
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context, node_name
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.ops.integer_product import requantization
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Tensor, Value
from kbitc.targets.reference.integer import requantized
from kbitc.targets.rules.base import BYTE_TABLE

Emit = Callable[[Context, ir.Node], Any]


def _numbers(node: ir.Node, first: int) -> list[int]:
    """The inputs from `first` on, each one constant number."""
    found = []
    for value in node.inputs[first:]:
        array = edit.constant(value)
        if array is None or array.size != 1:
            raise refuse(node, "zero points, multipliers and shifts must be constants", remedy="quantize again")
        found.append(int(array.reshape(-1)[0]))
    return found


def requantize(ctx: Context, node: ir.Node) -> Value:
    """kbitc::Requantize of accumulators that no product makes."""
    acc, numbers = attributes.value(ctx, node, 0), requantization(node)
    if numbers is None:
        raise refuse(node, "multipliers, shifts and the zero point must be constants", remedy="quantize again")
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(acc.shape))
    codes, source = requantized(ctx, numbers, node_name(node)), ctx.lazy(acc)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return codes(group, source.element(group, indices), indices[axis])

    return Lazy(element, acc.shape, "uint8", source.cost + 10, source.pointwise)


def integer_add(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerAdd: clip((((a - a_zero) a_mult + (b - b_zero) b_mult + half) >> shift) + zero, low, high)."""
    a, b = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    a_zero, b_zero, a_mult, b_mult, shift, zero = _numbers(node, 2)
    low, high = node.attributes.get_int("low", 0), node.attributes.get_int("high", 255)
    # Everything constant in one number: |mult| <= 2^21 and codes are below 2^8, so that it stays below 2^31.
    rest = (1 << (shift - 1)) - a_zero * a_mult - b_zero * b_mult

    def add(x: Expr, y: Expr) -> Expr:
        total = tirx.Cast("int32", x) * _i32(a_mult) + tirx.Cast("int32", y) * _i32(b_mult) + _i32(rest)
        return tirx.Cast("uint8", _clip((total >> _i32(shift)) + _i32(zero), low, high))

    return elementwise(ctx, node, [a, b], add, "uint8", 10)


def integer_mul(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerMul: (a - a_zero) (b - b_zero), int32."""
    a, b = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    a_zero, b_zero = _numbers(node, 2)

    def multiply(x: Expr, y: Expr) -> Expr:
        return (tirx.Cast("int32", x) - _i32(a_zero)) * (tirx.Cast("int32", y) - _i32(b_zero))

    return elementwise(ctx, node, [a, b], multiply, "int32", 5)


def integer_prelu(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerPRelu: clip((((x - x_zero) (x < x_zero ? below : above) + half) >> shift) + zero, low, high)."""
    x, below = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    x_zero, above, shift, zero = _numbers(node, 2)
    low, high = node.attributes.get_int("low", 0), node.attributes.get_int("high", 255)

    def bend(code: Expr, factor: Expr) -> Expr:
        number = tirx.Cast("int32", code) - _i32(x_zero)
        total = number * tirx.Select(number < _i32(0), factor, _i32(above)) + _i32(1 << (shift - 1))
        return tirx.Cast("uint8", _clip((total >> _i32(shift)) + _i32(zero), low, high))

    return elementwise(ctx, node, [x, below], bend, "uint8", 12)


def _i32(value: int) -> Expr:
    return tirx.const(value, "int32")


def _clip(value: Expr, low: int, high: int) -> Expr:
    return tirx.max(tirx.min(value, _i32(high)), _i32(low))


def table(ctx: Context, node: ir.Node) -> Value:
    """kbitc::Table: one byte for every byte. A kernel of its own: look-ups in registers take whole vectors of codes."""
    codes, entries = ctx.tensor(attributes.value(ctx, node, 0), "codes"), attributes.value(ctx, node, 1)
    if codes.dtype != "uint8" or tuple(entries.shape) != (256,):
        raise refuse(node, "a table takes uint8 codes to 256 entries", got=codes.dtype, remedy="quantize again")
    held = ctx.var(entries)

    def build(group: Group) -> list[TeTensor]:
        def element(indices: Sequence[Index]) -> Expr:
            return group.read(held, [tirx.Cast("int64", group.read(codes.var, indices))])

        return [compute(codes.shape, element, "entries")]

    made: list[Tensor] = ctx.kernel("byte_table", [(codes.shape, "uint8")], build, attributes={BYTE_TABLE: 1})
    return made[0]


def levels(ctx: Context, node: ir.Node) -> Value:
    """kbitc::LevelsKBit and BlockLevelsKBit of constants, for a reader that is no kernel rule."""
    arrays = []
    for index in range(len(node.inputs)):
        value = attributes.value(ctx, node, index)
        if not isinstance(value, Constant):
            raise refuse(node, "operands must be constants", remedy="quantize the model again")
        arrays.append(value.array)
    stream, grid, *factors, sizes = arrays
    n, taps, channels = (int(size) for size in sizes)
    found = integer_functions.levels(
        np.asarray(stream, np.uint8),
        np.asarray(grid, np.int8),
        (n, taps, channels),
        node.attributes.get_int("bits", 8),
        np.asarray(factors[0], np.int8) if factors else None,
        node.attributes.get_int("block", 1),
    )
    return Constant(found, "int8", node.outputs[0].name or "")


TABLE: dict[str, Emit] = {}
FUNCTION_TABLE: dict[str, Emit] = {
    REQUANTIZE: requantize,
    INTEGER_ADD: integer_add,
    INTEGER_MUL: integer_mul,
    INTEGER_PRELU: integer_prelu,
    LOOK_UP: table,
    LEVELS: levels,
    BLOCK_LEVELS: levels,
}
