"""Rescale, IntegerSoftmax, IntegerLayerNorm and IntegerRMSNorm: the functions of `kbitc.graph.integer_nonlinear`.

All in int64, by the very steps of the function bodies, on matrices [rows, columns] whose rows belong together. Where
a body lifts a number to keep it positive before a shift, here the shift is arithmetic, which gives the same floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import te, tirx

from kbitc.graph import edit
from kbitc.graph.integer_nonlinear import (
    FRACTION_BITS,
    LAYER_NORM,
    MAX_EXPONENT,
    PROBABILITY_STEPS,
    RATIO_BITS,
    RESCALE,
    RMS_NORM,
    SOFTMAX,
    VARIANCE_BITS,
)
from kbitc.graph.integer_text import DIGITS, NEWTON_STEPS
from kbitc.targets.lower import attributes, dims
from kbitc.targets.lower.attributes import axis_of
from kbitc.targets.lower.context import Context, node_name
from kbitc.targets.lower.contraction import Requantization
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Tensor, Value
from kbitc.targets.reference.integer import requantized

Emit = Callable[[Context, ir.Node], Any]


def _i64(value: int | Expr) -> Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else tirx.Cast("int64", value)


def _numbers(node: ir.Node, index: int) -> Any:
    """A constant input."""
    array = edit.constant(node.inputs[index])
    if array is None:
        raise refuse(node, f"input {index} must be a constant", remedy="quantize the model again")
    return array


def rescale(ctx: Context, node: ir.Node) -> Value:
    """kbitc::Rescale: clip((acc * multiplier + 2^(shift - 1)) >> shift, low, high), int32."""
    acc = attributes.value(ctx, node, 0)
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(acc.shape))
    low, high = node.attributes.get_int("low", 0), node.attributes.get_int("high", 0)
    multiplier, shift = (np.asarray(_numbers(node, index), np.int32).reshape(-1) for index in (1, 2))
    numbers, source = Requantization(multiplier, shift, 0, low, high), ctx.lazy(acc)
    scaled = requantized(ctx, numbers, node_name(node), "int32")

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return scaled(group, source.element(group, indices), indices[axis])

    return Lazy(element, acc.shape, "int32", source.cost + 10, source.pointwise)


def _matrix(ctx: Context, source: Value) -> Tensor:
    """The value in memory as [rows, columns]: columns are the last axis."""
    rows = dims.product(source.shape[:-1])
    return ctx.tensor(ctx.reshape(ctx.tensor(source), (rows, source.shape[-1])))


def softmax(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerSoftmax: codes of scale 1 / 255."""
    source = attributes.value(ctx, node, 0)
    rank = len(source.shape)
    axis = axis_of(node, node.attributes.get_int("axis", -1), rank)
    order = [*(i for i in range(rank) if i != axis), axis]
    moved = transposed(ctx, source, order)
    x = _matrix(ctx, moved)
    multiplier, shift = (int(_numbers(node, index).reshape(-1)[0]) for index in (1, 2))
    powers = ctx.var(attributes.value(ctx, node, 3))
    made = _softmax_rows(ctx, x, powers, multiplier, shift)
    return transposed(ctx, ctx.reshape(made, moved.shape), [order.index(i) for i in range(rank)])


def _softmax_rows(ctx: Context, x: Tensor, powers: Any, multiplier: int, shift: int) -> Tensor:
    rows, columns = x.shape

    def build(group: Group) -> list[TeTensor]:
        k, j = (te.reduce_axis((0, dims.expression(columns)), name) for name in "kj")
        peak = te.compute((rows,), lambda r: te.max(group.read(x.var, [r, k.var]), axis=k), name="row_max")

        def exponent(row: Index, column: Index) -> Expr:
            below = _i64(peak(row)) - _i64(group.read(x.var, [row, column]))
            return (below * _i64(multiplier) + _i64(1 << (shift - 1))) >> _i64(shift)

        exponents = te.compute((rows, columns), exponent, name="row_exponent")

        def power(row: Index, column: Index) -> Expr:
            found = group.read(powers, [exponents(row, column) & _i64((1 << FRACTION_BITS) - 1)])
            return _i64(found) >> tirx.min(exponents(row, column) >> _i64(FRACTION_BITS), _i64(MAX_EXPONENT))

        values = te.compute((rows, columns), power, name="row_power")
        total = te.compute((rows,), lambda r: te.sum(values(r, j.var), axis=j), name="row_sum")

        def share(indices: Sequence[Index]) -> Expr:
            row, column = indices
            scaled = values(row, column) * _i64(2 * PROBABILITY_STEPS) + total(row)
            return tirx.Cast("uint8", tirx.truncdiv(scaled, total(row) * _i64(2)))

        return [compute((rows, columns), share, "row_result")]

    return ctx.kernel("integer_softmax", [((rows, columns), "uint8")], build, kind="rows")[0]


def layer_norm(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerLayerNorm along the last axis, int32."""
    return _norm(ctx, node, (1, 2), (3, 4))


def rms_norm(ctx: Context, node: ir.Node) -> Value:
    """kbitc::IntegerRMSNorm along the last axis, int32."""
    return _norm(ctx, node, (1,), (2, 3))


def _norm(ctx: Context, node: ir.Node, vectors: tuple[int, ...], scalars: tuple[int, int]) -> Value:
    """vectors: inputs with a number a channel, gain and bias. scalars: epsilon and shift."""
    source = attributes.value(ctx, node, 0)
    held = [attributes.value(ctx, node, index) for index in vectors]
    epsilon, shift = (int(_numbers(node, index).reshape(-1)[0]) for index in scalars)
    if not all(isinstance(vector, Constant) for vector in held):
        raise refuse(node, "gain and bias must be constants", remedy="quantize the model again")
    made = _norm_rows(ctx, _matrix(ctx, source), [ctx.var(vector) for vector in held], epsilon, shift)
    return ctx.reshape(made, source.shape)


def _norm_rows(ctx: Context, x: Tensor, vectors: Sequence[Any], epsilon: int, shift: int) -> Tensor:
    """Numbers less their mean when there is a bias beside the gain; over the root of their mean square."""
    rows, columns = x.shape
    count = dims.expression(columns)

    def build(group: Group) -> list[TeTensor]:
        j = te.reduce_axis((0, count), "j")

        def number(row: Index, column: Index) -> Expr:
            return _i64(group.read(x.var, [row, column]))

        apart = _centred(rows, columns, number) if len(vectors) > 1 else number
        energy = te.compute(
            (rows,), lambda r: te.sum(apart(r, j.var) * apart(r, j.var), axis=j), name="row_square"
        )  # fmt: skip
        variance = te.compute(
            (rows,),
            lambda r: tirx.truncdiv(energy(r) * _i64(1 << VARIANCE_BITS), count) + _i64(epsilon),
            name="row_variance",
        )
        root = _square_root(rows, variance)

        def result(indices: Sequence[Index]) -> Expr:
            row, column = indices
            fine = apart(row, column) * _i64(1 << (RATIO_BITS + VARIANCE_BITS // 2 + 1))
            # |ratio| < 2^24: lifted by so much, the division cuts a positive number.
            lifted = fine + root(row) * _i64(1 << 25) + root(row)
            ratio = tirx.truncdiv(lifted, root(row) * _i64(2)) - _i64(1 << 24)
            gain, *bias = (_i64(group.read(vector, [column])) for vector in vectors)
            scaled = (ratio * gain + _i64(1 << (shift - 1))) >> _i64(shift)
            return tirx.Cast("int32", sum(bias, scaled))

        return [compute((rows, columns), result, "row_result")]

    return ctx.kernel("integer_norm", [((rows, columns), "int32")], build, kind="rows")[0]


def _centred(rows: Any, columns: Any, number: Callable[[Index, Index], Expr]) -> TeTensor:
    """Numbers less their mean, rounded half up."""
    count = dims.expression(columns)
    k = te.reduce_axis((0, count), "k")
    total = te.compute((rows,), lambda r: te.sum(number(r, k.var), axis=k), name="row_sum")
    means = te.compute(
        (rows,), lambda r: tirx.floordiv(total(r) * _i64(2) + count, count * _i64(2)), name="row_mean"
    )  # fmt: skip
    return te.compute((rows, columns), lambda r, c: number(r, c) - means(r), name="row_difference")


def _square_root(rows: Any, numbers: TeTensor) -> TeTensor:
    """floor(sqrt(n)) by Newton's steps from a power of two above it; then one less where it is too large."""
    digit = te.reduce_axis((0, DIGITS), "digit")

    def digits(row: Index) -> Expr:
        reached = numbers(row) >= (_i64(1) << (_i64(digit.var) * _i64(2)))
        return te.sum(tirx.Select(reached, _i64(1), _i64(0)), axis=digit)

    counted = te.compute((rows,), digits, name="row_digits")
    root = te.compute((rows,), lambda r: _i64(1) << counted(r), name="row_start")
    for step in range(NEWTON_STEPS):
        root = _newton(rows, numbers, root, f"row_newton{step}")
    over = root
    return te.compute(
        (rows,), lambda r: over(r) - tirx.Select(numbers(r) < over(r) * over(r), _i64(1), _i64(0)), name="row_root"
    )


def _newton(rows: Any, numbers: TeTensor, root: TeTensor, name: str) -> TeTensor:
    """(root + n / root) / 2, rounded down."""
    halves = _i64(2)
    return te.compute((rows,), lambda r: tirx.truncdiv(root(r) + tirx.truncdiv(numbers(r), root(r)), halves), name=name)


TABLE: dict[str, Emit] = {}
FUNCTION_TABLE: dict[str, Emit] = {RESCALE: rescale, SOFTMAX: softmax, LAYER_NORM: layer_norm, RMS_NORM: rms_norm}
