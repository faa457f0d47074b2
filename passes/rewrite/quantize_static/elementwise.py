"""Sums, products and functions of codes.

Before:
    Add(a, b), Sub(a, b), Mul(a, b); PRelu(x, slope); Sigmoid(Mul(x, 2.0)) and other functions of one value
After:
    kbitc::IntegerAdd(a.q, b.q, ...); kbitc::Requantize(kbitc::IntegerMul(a.q, b.q, ...));
    kbitc::IntegerPRelu(x.q, ...); kbitc::Table(x.q, t)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit, images
from kbitc.graph import integer_functions as integer
from kbitc.passes.allocate.proofs import steepest
from kbitc.passes.rewrite.quantize_static.builder import I32, U8, Builder, Sums
from kbitc.quant.static import Codes


def add(builder: Builder, node: ir.Node, value: ir.Value, low: int = 0, high: int = 255) -> None:
    """Give `value` the codes of a sum or difference; `value` is the node's output or a limited form of it."""
    left, right = builder.form(node).inputs
    a, b, y = builder.codes_of(left), builder.codes_of(right), builder.codes_of(value)
    sign = -1 if node.op_type == "Sub" else 1
    a_mult, b_mult, shift = add_multipliers(a.scale / y.scale, sign * b.scale / y.scale)
    numbers = (a.zero, b.zero, a_mult, b_mult, shift, y.zero)
    inputs = [_codes(builder, item, node) for item in (left, right)]
    inputs += [builder.scalar(number) for number in numbers]
    limits = {"low": max(low, 0), "high": min(high, y.high)}
    builder.codes[value] = builder.emit(node, integer.INTEGER_ADD, inputs, f"{value.name}.q", U8, value.shape, **limits)


def add_multipliers(a_ratio: float, b_ratio: float) -> tuple[int, int, int]:
    """(a_mult, b_mult, shift) with mult / 2^shift nearest to the ratios and |mult| <= 2^21.

    Raises:
        ValueError: a ratio of 2^20 or more, which no shift of at least 1 can hold.
    """
    shift = _shift(max(abs(a_ratio), abs(b_ratio)))
    return round(a_ratio * (1 << shift)), round(b_ratio * (1 << shift)), shift


def _shift(largest: float) -> int:
    """The largest shift that leaves the multiplier of the largest ratio at 2^21 or less.

    Raises:
        ValueError: a ratio of 2^20 or more, which no shift of at least 1 can hold.
    """
    shift = integer.ADD_MAX_SHIFT
    while shift > 1 and round(largest * (1 << shift)) > integer.ADD_MULTIPLIER_LIMIT:
        shift -= 1
    if round(largest * (1 << shift)) > integer.ADD_MULTIPLIER_LIMIT:
        raise ValueError(f"a ratio of scales must be under 2^20, got {largest}")
    return shift


def prelu(builder: Builder, node: ir.Node) -> None:
    """Give the result of a PRelu codes: those below the zero point of x take a factor of their own a channel."""
    (source,), value = builder.form(node).inputs, node.outputs[0]
    x, y, slope = builder.codes_of(source), builder.codes_of(value), edit.constant(node.inputs[1])
    if slope is None:
        raise InternalError("a PRelu whose slope is no constant", where=node.name or "")
    ratio = x.scale / y.scale
    shift = _shift(ratio * steepest(node))
    below = np.rint(slope.astype(np.float64) * ratio * (1 << shift)).astype(np.int32)
    inputs = [builder.read(source, node), builder.constant(f"{value.name}.below", below)]
    inputs += [builder.scalar(number) for number in (x.zero, round(ratio * (1 << shift)), shift, y.zero)]
    builder.codes[value] = builder.emit(
        node, integer.INTEGER_PRELU, inputs, f"{value.name}.q", U8, value.shape, low=0, high=y.high
    )


def mul(builder: Builder, node: ir.Node) -> Sums:
    """The int32 product of two values."""
    left, right = builder.form(node).inputs
    a, b = builder.codes_of(left), builder.codes_of(right)
    inputs = [_codes(builder, item, node) for item in (left, right)]
    inputs += [builder.zero(a, np.int32), builder.zero(b, np.int32)]
    made = builder.emit(node, integer.INTEGER_MUL, inputs, f"{node.name}.product", I32, node.outputs[0].shape)
    return Sums(made, np.array([a.scale * b.scale]), 0)


def _codes(builder: Builder, value: ir.Value, node: ir.Node) -> ir.Value:
    """The codes of an operand, which may be a constant."""
    array = edit.constant(value)
    if array is None:
        return builder.read(value, node)
    return constant_codes(builder, value, array, builder.codes_of(value))


def constant_codes(builder: Builder, value: ir.Value, array: npt.NDArray[np.generic], codes: Codes) -> ir.Value:
    """A constant as codes."""
    if value not in builder.codes:
        ratio = np.asarray(array, np.float32) / np.float32(codes.scale)
        held = np.clip(np.rint(ratio) + codes.zero, 0, codes.high).astype(np.uint8)
        builder.codes[value] = builder.constant(f"{value.name}.q", held)
    return builder.codes[value]


def tabled(builder: Builder, image: ir.Value, root: ir.Value, before: ir.Node) -> None:
    """Give an image of `root` codes by a table."""
    source, target = builder.codes_of(root), builder.codes_of(image)
    opset = builder.model.graph.opset_imports.get("", 21)
    entries = table_entries(source, target, images.function_of(image, root, opset, builder.plan.carried))
    builder.codes[image] = table(builder, builder.codes[root], entries, image, before)


def table(
    builder: Builder, codes: ir.Value, entries: npt.NDArray[np.uint8], value: ir.Value, before: ir.Node
) -> ir.Value:
    """A look-up of codes in a table."""
    held = builder.constant(f"{value.name}.table", entries)
    return builder.emit(before, integer.TABLE, [codes, held], f"{value.name}.q", U8, value.shape)


def table_entries(source: Codes, target: Codes, function: object = None) -> npt.NDArray[np.uint8]:
    """u8 [256]: the target's code of function(x) for the x of each code of the source; unused codes repeat the last."""
    numbers = (np.minimum(np.arange(256), source.high) - source.zero).astype(np.float32) * np.float32(source.scale)
    made = function(numbers) if callable(function) else numbers
    ratio = np.nan_to_num(np.asarray(made, np.float64) / target.scale, nan=0.0)
    return np.asarray(np.clip(np.rint(ratio) + target.zero, 0, target.high), np.uint8)
