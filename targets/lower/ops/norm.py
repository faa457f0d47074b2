"""Softmax and normalisations. They work on matrices [rows, columns]: what is normalised together is one row.

Their stages carry fixed names, so that schedule rules find them: `row_max`, `row_exp`, `row_sum`, `row_mean`,
`row_square`, `row_result`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.attributes import axis_of
from kbitc.targets.lower.broadcast import elementwise, stretch
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group, TeTensor, compute, named
from kbitc.targets.lower.ops.movement import dim_is, transposed
from kbitc.targets.lower.ops.reduce import reduced
from kbitc.targets.lower.scalar import const
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Tensor, Value

Emit = Callable[[Context, ir.Node], Any]


def _wide(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _matrix(ctx: Context, source: Value, split: int) -> Tensor:
    """The value in memory as [rows, columns]: columns are the axes from `split` on."""
    rows, columns = dims.product(source.shape[:split]), dims.product(source.shape[split:])
    return ctx.tensor(ctx.reshape(ctx.tensor(source), (rows, columns)))


def softmax(logarithm: bool) -> Emit:
    """An emitter for Softmax or LogSoftmax (opset 13: along one axis)."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        source = attributes.value(ctx, node, 0)
        rank = len(source.shape)
        axis = axis_of(node, node.attributes.get_int("axis", -1), rank)
        order = [*(i for i in range(rank) if i != axis), axis]
        moved = transposed(ctx, source, order)
        result = ctx.reshape(_softmax_rows(ctx, _matrix(ctx, moved, rank - 1), logarithm), moved.shape)
        back = [order.index(i) for i in range(rank)]
        return transposed(ctx, result, back)

    return emit


def _softmax_rows(ctx: Context, x: Tensor, logarithm: bool) -> Tensor:
    rows, columns = x.shape
    wide = _wide(x.dtype)

    def build(group: Group) -> list[TeTensor]:
        def read(row: Index, column: Index) -> Expr:
            return scalar.cast(group.read(x.var, [row, column]), wide)

        k = te.reduce_axis((0, dims.expression(columns)), "k")
        peak = te.compute((rows,), lambda r: te.max(read(r, k.var), axis=k), name="row_max")
        parts = te.compute((rows, columns), lambda r, c: scalar.exp_below(read(r, c) - peak(r)), name="row_exp")
        j = te.reduce_axis((0, dims.expression(columns)), "j")
        total = te.compute((rows,), lambda r: te.sum(parts(r, j.var), axis=j), name="row_sum")

        def result(indices: Sequence[Index]) -> Expr:
            row, column = indices
            if logarithm:
                return scalar.cast(read(row, column) - peak(row) - scalar.log(total(row)), x.dtype)
            return scalar.cast(parts(row, column) / total(row), x.dtype)

        return [compute((rows, columns), result, "row_result")]

    name = "log_softmax" if logarithm else "softmax"
    return ctx.kernel(name, [((rows, columns), x.dtype)], build, kind="rows")[0]


def hardmax(ctx: Context, node: ir.Node) -> Value:
    """Hardmax: 1 at the first largest element along the axis, 0 elsewhere."""
    from kbitc.targets.lower.ops.reduce import arg_extreme

    source = ctx.tensor(attributes.value(ctx, node, 0))
    axis = axis_of(node, node.attributes.get_int("axis", -1), len(source.shape))
    place = ir.Node("", "ArgMax", node.inputs, [ir.AttrInt64("axis", axis), ir.AttrInt64("keepdims", 1)])
    best = ctx.lazy(arg_extreme(largest=True)(ctx, place))
    zero = tirx.IntImm("int64", 0)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        found = best.element(group, [*indices[:axis], zero, *indices[axis + 1 :]])
        return tirx.Select(found == indices[axis], tirx.const(1, source.dtype), tirx.const(0, source.dtype))

    return Lazy(element, source.shape, source.dtype, cost=3)


Affine = Callable[[Group, Expr, Index, Index], Expr]


def normalised_rows(
    ctx: Context, x: Tensor, epsilon: float, centre: bool, affine: Affine, name: str, stash: str = "float32"
) -> list[Tensor]:
    """(x - mean) / sqrt(mean square + epsilon) of every row, then affine(group, value, row, column).

    Args:
        ctx: the lowering.
        x: [rows, columns].
        epsilon: added to the variance.
        centre: subtract the mean first; without it this is the root mean square form.
        affine: scale and shift.
        name: of the kernel.
        stash: type in which mean and variance are computed.

    Returns:
        The result [rows, columns], the means and the inverse deviations [rows].
    """
    rows, columns = x.shape
    wide = "float64" if x.dtype == "float64" else stash

    def build(group: Group) -> list[TeTensor]:
        count = tirx.Cast(wide, dims.expression(columns))

        def read(row: Index, column: Index) -> Expr:
            return scalar.cast(group.read(x.var, [row, column]), wide)

        k = te.reduce_axis((0, dims.expression(columns)), "k")
        total = te.compute((rows,), lambda r: te.sum(read(r, k.var), axis=k), name="row_sum")
        mean = te.compute((rows,), lambda r: total(r) / count if centre else tirx.const(0.0, wide), name="row_mean")
        j = te.reduce_axis((0, dims.expression(columns)), "j")

        def square(row: Index) -> Any:
            return te.sum(named(read(row, j.var) - mean(row), lambda d: d * d), axis=j)

        squares = te.compute((rows,), square, name="row_square")
        inverse = te.compute(
            (rows,),
            lambda r: tirx.const(1.0, wide) / tirx.sqrt(squares(r) / count + tirx.const(epsilon, wide)),
            name="row_inverse",
        )

        def result(indices: Sequence[Index]) -> Expr:
            row, column = indices
            value = (read(row, column) - mean(row)) * inverse(row)
            return scalar.cast(affine(group, scalar.cast(value, x.dtype), row, column), x.dtype)

        return [compute((rows, columns), result, "row_result"), mean, inverse]

    outputs: list[tuple[tuple[Dim, ...], str]] = [((rows, columns), x.dtype), ((rows,), wide), ((rows,), wide)]
    return ctx.kernel(name, outputs, build, kind="rows")


def layer_norm(root_mean_square: bool) -> Emit:
    """An emitter for LayerNormalization or RMSNormalization."""

    def emit(ctx: Context, node: ir.Node) -> Any:
        source = attributes.value(ctx, node, 0)
        rank = len(source.shape)
        axis = axis_of(node, node.attributes.get_int("axis", -1), rank)
        epsilon = attributes.float_attribute(node, "epsilon", 1e-5)
        scale = _flat_parameter(ctx, attributes.optional(ctx, node, 1), source.shape[axis:])
        shift = (
            None if root_mean_square else _flat_parameter(ctx, attributes.optional(ctx, node, 2), source.shape[axis:])
        )

        def affine(group: Group, value: Expr, row: Index, column: Index) -> Expr:
            value = value if scale is None else value * scale.element(group, [column])
            return value if shift is None else value + shift.element(group, [column])

        name = "rms_norm" if root_mean_square else "layer_norm"
        matrix = _matrix(ctx, source, axis)
        result, mean, inverse = normalised_rows(ctx, matrix, epsilon, not root_mean_square, affine, name)
        kept = (*source.shape[:axis], *(1 for _ in source.shape[axis:]))
        outputs = [ctx.reshape(result, source.shape), ctx.reshape(mean, kept), ctx.reshape(inverse, kept)]
        return outputs[: len(node.outputs)]

    return emit


def _flat_parameter(ctx: Context, value: Value | None, shape: Sequence[Dim]) -> Lazy | None:
    """A scale or shift, broadcast to the normalised axes, as a vector in memory."""
    if value is None:
        return None
    wide = stretch(ctx, value, tuple(shape))
    if wide.element is not ctx.lazy(value).element and not dims.same_shape(value.shape, shape):
        value = ctx.tensor(wide)
    return ctx.lazy(ctx.reshape(ctx.tensor(value), (dims.product(shape),)))


def group_norm(instance: bool) -> Emit:
    """An emitter for InstanceNormalization or GroupNormalization."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        source = attributes.value(ctx, node, 0)
        channels = attributes.static_shape(node, source.shape[1:2], "the channels")[0]
        groups = channels if instance else node.attributes.get_int("num_groups", 1)
        if groups < 1 or channels % groups:
            raise refuse(node, "channels do not divide into the groups", got=f"{channels} by {groups}")
        epsilon = attributes.float_attribute(node, "epsilon", 1e-5)
        scale, shift = (ctx.lazy(ctx.tensor(attributes.value(ctx, node, index))) for index in (1, 2))
        pixels = dims.product(source.shape[2:])
        per_group = channels // groups
        # Before opset 21 GroupNormalization has one scale a group.
        each_channel = instance or dim_is(scale.shape[0], channels)

        def affine(group: Group, value: Expr, row: Index, column: Index) -> Expr:
            place = tirx.floormod(row, groups)
            if each_channel and per_group > 1:
                place = place * per_group + tirx.floordiv(column, dims.expression(pixels))
            return value * scale.element(group, [place]) + shift.element(group, [place])

        rows = dims.product([source.shape[0], groups])
        matrix = ctx.tensor(ctx.reshape(ctx.tensor(source), (rows, dims.product([per_group, pixels]))))
        result = normalised_rows(ctx, matrix, epsilon, True, affine, "instance_norm" if instance else "group_norm")[0]
        return ctx.reshape(result, source.shape)

    return emit


def batch_norm(ctx: Context, node: ir.Node) -> Value:
    """BatchNormalization at inference: scale * (x - mean) / sqrt(variance + epsilon) + shift, channels at axis 1."""
    if node.attributes.get_int("training_mode", 0) == 1:
        raise refuse(node, "BatchNormalization in training mode", remedy="export the model for inference")
    source = attributes.value(ctx, node, 0)
    epsilon = attributes.float_attribute(node, "epsilon", 1e-5)
    column = (1, -1, *(1 for _ in source.shape[2:]))
    parts = []
    for index in range(1, 5):
        part = attributes.value(ctx, node, index)
        parts.append(ctx.reshape(part, tuple(part.shape[0] if dim == -1 else dim for dim in column)))

    def function(x: Expr, scale: Expr, shift: Expr, mean: Expr, variance: Expr) -> Expr:
        factor = scale / tirx.sqrt(variance + const(epsilon, variance))
        return scalar.cast((x - mean) * factor + shift, scalar.dtype_of(x))

    return elementwise(ctx, node, [source, *parts], function, cost=10)


def local_response_norm(ctx: Context, node: ir.Node) -> Value:
    """LRN: x / (bias + alpha / size * (sum of squares over neighbouring channels))^beta."""
    from kbitc.targets.lower.ops.elementwise import pow_expression

    source = ctx.tensor(attributes.value(ctx, node, 0))
    size = node.attributes.get_int("size", 1)
    alpha, beta, bias = (
        attributes.float_attribute(node, name, default)
        for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    channels = dims.expression(source.shape[1])
    lazy = ctx.lazy(source)

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, size), "k")

        def element(indices: Sequence[Index]) -> Any:
            place = indices[1] + k.var - (size - 1) // 2
            value = lazy.element(group, [indices[0], place, *indices[2:]])
            inside = tirx.all(place >= 0, place < channels)
            return te.sum(tirx.if_then_else(inside, value * value, const(0.0, value)), axis=k)

        return [compute(source.shape, element, "squares")]

    squares = ctx.kernel("local_response", [(source.shape, source.dtype)], build, kind="reduce")[0]

    def function(x: Expr, square: Expr) -> Expr:
        base = const(bias, x) + const(alpha / size, x) * square
        return x / pow_expression(base, const(beta, x))

    return elementwise(ctx, node, [source, squares], function, cost=34)


def mean_variance_norm(ctx: Context, node: ir.Node) -> Value:
    """MeanVarianceNormalization: (x - mean) / (deviation + 1e-9) over the axes."""
    source = ctx.tensor(attributes.value(ctx, node, 0))
    axes = attributes.axes_of(node, node.attributes.get_ints("axes", (0, 2, 3)), len(source.shape))
    kept = tuple(1 if axis in axes else dim for axis, dim in enumerate(source.shape))
    count = dims.expression(dims.product(source.shape[axis] for axis in axes))

    def mean(value: Value) -> Value:
        total = ctx.reshape(reduced(ctx, value, axes, "sum", name="mean"), kept)
        return ctx.tensor(elementwise(ctx, node, [total], lambda v: v / scalar.cast(count, scalar.dtype_of(v))))

    centred = ctx.tensor(elementwise(ctx, node, [source, mean(source)], lambda x, m: x - m))
    variance = mean(elementwise(ctx, node, [centred], lambda x: x * x))
    return elementwise(ctx, node, [centred, variance], lambda x, v: x / (tirx.sqrt(v) + const(1e-9, x)), cost=8)


TABLE: dict[str, Emit] = {
    "Softmax": softmax(logarithm=False),
    "LogSoftmax": softmax(logarithm=True),
    "Hardmax": hardmax,
    "LayerNormalization": layer_norm(root_mean_square=False),
    "RMSNormalization": layer_norm(root_mean_square=True),
    "InstanceNormalization": group_norm(instance=True),
    "GroupNormalization": group_norm(instance=False),
    "BatchNormalization": batch_norm,
    "LRN": local_response_norm,
    "MeanVarianceNormalization": mean_variance_norm,
}
