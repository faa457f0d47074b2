"""Reductions: Reduce*, ArgMax and ArgMin, CumSum, global pools, LpNormalization, TopK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims, dtypes, scalar
from kbitc.targets.lower.attributes import axes_of, axis_of, known_dims, known_ints
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context, number
from kbitc.targets.lower.group import Group, TeTensor, compute, named
from kbitc.targets.lower.ops.movement import dim_is, filled
from kbitc.targets.lower.scalar import const
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Value

Scalar = Callable[[Expr], Expr]


@dataclass(frozen=True)
class Key:
    """Integers in the order of floats, so that the identity of a maximum lies below -infinity.

    te.max of floats starts at the lowest finite number, and TVM's schedules know no other start.
    The bits of a float are already in order, except that those of negative ones run backwards.

    Attributes:
        integer: type of the key.
        magnitude: all bits but the sign.
        sign_place: number of the sign bit.
    """

    integer: str
    magnitude: int
    sign_place: int

    def turned(self, bits: Expr) -> Expr:
        """Bits of a float to its key, or a key to the bits: the same exchange both ways."""
        negative = bits >> tirx.const(self.sign_place, self.integer)
        return bits ^ (negative & tirx.const(self.magnitude, self.integer))


KEYS = {"float32": Key("int32", 0x7FFFFFFF, 31), "float64": Key("int64", 0x7FFFFFFFFFFFFFFF, 63)}

_REDUCERS: dict[str, Any] = {
    "sum": te.sum,
    "max": te.max,
    "min": te.min,
    "prod": te.comm_reducer(lambda a, b: a * b, lambda dtype: tirx.const(1, dtype), name="prod"),
}


def reduced(
    ctx: Context, source: Value, axes: Sequence[int], reducer: str, prepare: Scalar | None = None, name: str = "reduce"
) -> Value:
    """A reduction over axes; the axes are gone from the result. 16-bit floats are reduced in float32.

    Args:
        ctx: the lowering.
        source: what is reduced.
        axes: sorted, not negative.
        reducer: "sum", "max", "min" or "prod".
        prepare: applied to each element first.
        name: of the kernel.
    """
    wide = "float32" if source.dtype in ("float16", "bfloat16") else source.dtype
    shape = tuple(dim for axis, dim in enumerate(source.shape) if axis not in axes)
    if any(dim_is(source.shape[axis], 0) for axis in axes):
        return filled(shape, _identity(reducer, wide), wide)
    lazy = ctx.lazy(source)
    key = KEYS.get(wide) if reducer in ("max", "min") else None

    def build(group: Group) -> list[TeTensor]:
        loops = {axis: te.reduce_axis((0, dims.expression(source.shape[axis])), f"k{axis}") for axis in axes}

        def element(indices: Sequence[Index]) -> Any:
            kept = iter(indices)
            own = [loops[axis].var if axis in loops else next(kept) for axis in range(len(source.shape))]
            value = scalar.cast(lazy.element(group, own), wide)
            value = value if prepare is None else named(value, prepare)
            if key is not None:
                value = named(tirx.reinterpret(key.integer, value), key.turned)
            return _REDUCERS[reducer](value, axis=list(loops.values()))

        return [compute(shape, element, name)]

    if key is None:
        return ctx.kernel(name, [(shape, wide)], build, kind="reduce")[0]
    found = ctx.lazy(ctx.kernel(name, [(shape, key.integer)], build, kind="reduce")[0])

    def decoded(group: Group, indices: Sequence[Index]) -> Expr:
        return tirx.reinterpret(wide, named(found.element(group, indices), key.turned))

    return Lazy(decoded, shape, wide, cost=3)


def _identity(reducer: str, dtype: str) -> float:
    if reducer in ("sum", "prod"):
        return 0 if reducer == "sum" else 1
    if dtypes.is_float(dtype):
        return float("-inf") if reducer == "max" else float("inf")
    low, high = dtypes.INTEGER_RANGE.get(dtype, (0, 1))
    return low if reducer == "max" else high


def reduction_axes(ctx: Context, node: ir.Node, rank: int) -> list[int] | None:
    """The axes of a Reduce node; None when it does nothing (noop_with_empty_axes)."""
    axes = known_ints(ctx, node, 1, "axes")
    if axes is None:
        given = node.attributes.get_ints("axes")
        axes = list(given) if given is not None else []
    if not axes:
        if node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return None
        return list(range(rank))
    return axes_of(node, axes, rank)


def reduce_with(
    reducer: str, prepare: Scalar | None = None, finish: Callable[[Expr, Expr], Expr] | None = None, cost: int = 1
) -> Callable[[Context, ir.Node], Value]:
    """An emitter for a Reduce operator.

    Args:
        reducer: see `reduced`.
        prepare: applied to each element.
        finish: (result, number of elements as int64) -> result.
        cost: operations of `finish`.
    """

    def emit(ctx: Context, node: ir.Node) -> Value:
        source = attributes.value(ctx, node, 0)
        axes = reduction_axes(ctx, node, len(source.shape))
        if axes is None:
            return _single(ctx, node, source, prepare, finish, cost)
        as_bool = source.dtype == "bool"
        if as_bool:
            source = elementwise(ctx, node, [source], lambda v: tirx.Cast("uint8", v), "uint8")
        result = reduced(ctx, source, axes, reducer, prepare, node.op_type.lower())
        count = dims.expression(dims.product(source.shape[axis] for axis in axes))
        dtype = "bool" if as_bool else source.dtype
        if finish is not None or result.dtype != dtype:
            result = _finished(ctx, node, result, finish, count, dtype, cost)
        if node.attributes.get_int("keepdims", 1) == 1:
            return ctx.reshape(result, tuple(1 if i in axes else dim for i, dim in enumerate(source.shape)))
        return result

    return emit


def _single(
    ctx: Context,
    node: ir.Node,
    source: Value,
    prepare: Scalar | None,
    finish: Callable[[Expr, Expr], Expr] | None,
    cost: int,
) -> Value:
    """A reduction over no axes: each element alone."""
    one = dims.expression(1)

    def function(x: Expr) -> Expr:
        value = x if prepare is None else named(x, prepare)
        return value if finish is None else named(value, lambda v: finish(v, one))

    return elementwise(ctx, node, [source], function, cost=cost + 2)


def _finished(
    ctx: Context,
    node: ir.Node,
    result: Value,
    finish: Callable[[Expr, Expr], Expr] | None,
    count: Expr,
    dtype: str,
    cost: int,
) -> Value:
    def function(x: Expr) -> Expr:
        value = x if finish is None else finish(x, count)
        return tirx.NE(value, const(0, value)) if dtype == "bool" else scalar.cast(value, dtype)

    return elementwise(ctx, node, [result], function, dtype, cost)


def _mean(total: Expr, count: Expr) -> Expr:
    if dtypes.is_float(scalar.dtype_of(total)):
        return total / scalar.cast(count, scalar.dtype_of(total))
    return tirx.truncdiv(total, scalar.cast(count, scalar.dtype_of(total)))


def _square_root(x: Expr, count: Expr) -> Expr:
    if dtypes.is_float(scalar.dtype_of(x)):
        return tirx.sqrt(x)
    return scalar.cast(tirx.sqrt(tirx.Cast("float64", x)), scalar.dtype_of(x))


def _absolute(x: Expr) -> Expr:
    return x if scalar.dtype_of(x).startswith("uint") else tirx.abs(x)


def log_sum_exp(ctx: Context, node: ir.Node) -> Value:
    """ReduceLogSumExp with the largest element taken out first."""
    source = attributes.value(ctx, node, 0)
    axes = reduction_axes(ctx, node, len(source.shape))
    if axes is None:
        return source
    kept = tuple(1 if axis in axes else dim for axis, dim in enumerate(source.shape))
    x = ctx.tensor(elementwise(ctx, node, [source], lambda v: scalar.cast(v, _wide(source.dtype)), _wide(source.dtype)))
    peak = ctx.reshape(reduced(ctx, x, axes, "max", name="peak"), kept)
    # An infinite peak is left in: the exponentials are then 0, 1 or infinite as they should.
    bound = tirx.max_value(x.dtype)
    peak = ctx.tensor(elementwise(ctx, node, [peak], lambda v: tirx.max(tirx.min(v, bound), -bound)))
    parts = elementwise(ctx, node, [x, peak], lambda v, p: scalar.exp(v - p), cost=13)
    total = ctx.reshape(reduced(ctx, parts, axes, "sum", name="sum_exp"), kept)
    result = elementwise(ctx, node, [total, peak], lambda t, p: scalar.log(t) + p, cost=15)
    narrow = elementwise(ctx, node, [result], lambda v: scalar.cast(v, source.dtype), source.dtype)
    if node.attributes.get_int("keepdims", 1) == 1:
        return narrow
    return ctx.reshape(narrow, tuple(dim for axis, dim in enumerate(source.shape) if axis not in axes))


def _wide(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def arg_extreme(largest: bool) -> Callable[[Context, ir.Node], Value]:
    """An emitter for ArgMax or ArgMin."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        source = attributes.value(ctx, node, 0)
        axis = axis_of(node, node.attributes.get_int("axis", 0), len(source.shape))
        last = node.attributes.get_int("select_last_index", 0) == 1
        result = _arg_kernel(ctx, source, axis, _arg_reducer(largest, last, _wide(source.dtype)))
        if node.attributes.get_int("keepdims", 1) == 1:
            return ctx.reshape(result, tuple(1 if i == axis else dim for i, dim in enumerate(source.shape)))
        return result

    return emit


def _arg_reducer(largest: bool, last: bool, dtype: str) -> Any:
    def join(a: Sequence[Expr], b: Sequence[Expr]) -> tuple[Expr, Expr]:
        better = a[1] > b[1] if largest else a[1] < b[1]
        tie = tirx.And(a[1] == b[1], a[0] > b[0] if last else a[0] < b[0])
        # An index of -1 is "nothing yet".
        keep = tirx.Or(b[0] < 0, tirx.And(a[0] >= 0, tirx.Or(better, tie)))
        return tirx.Select(keep, a[0], b[0]), tirx.Select(keep, a[1], b[1])

    def start(index_type: str, value_type: str) -> tuple[Expr, Expr]:
        return tirx.const(-1, index_type), number(0, value_type)

    return te.comm_reducer(join, start, name="arg")


def _arg_kernel(ctx: Context, source: Value, axis: int, reducer: Any) -> Value:
    lazy = ctx.lazy(source)
    shape = (*source.shape[:axis], *source.shape[axis + 1 :])

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, dims.expression(source.shape[axis])), "k")

        def pair(*indices: Index) -> Any:
            value = lazy.element(group, [*indices[:axis], k.var, *indices[axis:]])
            return reducer((tirx.Cast("int64", k.var), scalar.cast(value, _wide(source.dtype))), axis=k)

        where, _ = te.compute(shape, pair, name="best")
        return [compute(shape, lambda indices: where(*indices), "index")]

    return ctx.kernel("arg", [(shape, "int64")], build, kind="general")[0]


def cumulative_sum(ctx: Context, node: ir.Node) -> Value:
    """CumSum, exclusive or reverse: every element sums its predecessors."""
    source = ctx.tensor(attributes.value(ctx, node, 0))
    axes = known_ints(ctx, node, 1, "the axis of a CumSum") or [0]
    axis = axis_of(node, axes[0], len(source.shape))
    exclusive, reverse = (node.attributes.get_int(name, 0) == 1 for name in ("exclusive", "reverse"))
    lazy, size = ctx.lazy(source), dims.expression(source.shape[axis])

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, size), "k")

        def element(indices: Sequence[Index]) -> Any:
            own = [*indices[:axis], k.var, *indices[axis + 1 :]]
            here = indices[axis]
            counts = (
                (k.var > here if exclusive else k.var >= here)
                if reverse
                else (k.var < here if exclusive else k.var <= here)
            )
            value = lazy.element(group, own)
            return te.sum(tirx.Select(counts, value, const(0, value)), axis=k)

        return [compute(source.shape, element, "cumulative")]

    return ctx.kernel("cumulative_sum", [(source.shape, source.dtype)], build, kind="reduce")[0]


def lp_normalization(ctx: Context, node: ir.Node) -> Value:
    """LpNormalization: x divided by its L1 or L2 norm along an axis; 0 where the norm is 0."""
    source = ctx.tensor(attributes.value(ctx, node, 0))
    axis = axis_of(node, node.attributes.get_int("axis", -1), len(source.shape))
    order = node.attributes.get_int("p", 2)
    total = reduced(ctx, source, [axis], "sum", (lambda v: v * v) if order == 2 else _absolute, "norm")
    total = ctx.reshape(total, tuple(1 if i == axis else dim for i, dim in enumerate(source.shape)))
    norm = ctx.tensor(elementwise(ctx, node, [total], lambda v: tirx.sqrt(v) if order == 2 else v))

    def quotient(x: Expr, n: Expr) -> Expr:
        return named(n, lambda d: tirx.Select(d == const(0, d), const(0, x), x / d))

    return elementwise(ctx, node, [source, norm], quotient, cost=4)


def top_k(ctx: Context, node: ir.Node) -> list[Value]:
    """TopK by rank counting: element i goes to the place that says how many elements come before it."""
    source = ctx.tensor(attributes.value(ctx, node, 0))
    count = (known_dims(ctx, node, 1, "K") or [node.attributes.get_int("k", 1)])[0]
    axis = axis_of(node, node.attributes.get_int("axis", -1), len(source.shape))
    largest = node.attributes.get_int("largest", 1) == 1
    size = source.shape[axis]
    if dims.provably(dims.expression(count) > dims.expression(size)):
        raise refuse(node, "K is larger than the axis", got=count, remedy="repair the model")
    lazy = ctx.lazy(source)
    rank = _ranks(ctx, lazy, axis, largest)
    shape = (*source.shape[:axis], count, *source.shape[axis + 1 :])

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, dims.expression(size)), "k")

        def element(indices: Sequence[Index]) -> Any:
            own = [*indices[:axis], k.var, *indices[axis + 1 :]]
            hit = rank.element(group, own) == tirx.Cast("int64", indices[axis])
            return te.sum(tirx.Select(hit, tirx.Cast("int64", k.var), tirx.const(0, "int64")), axis=k)

        return [compute(shape, element, "places")]

    places = ctx.kernel("top_k", [(shape, "int64")], build, kind="reduce")[0]
    picks = ctx.lazy(places)
    values = Lazy(
        lambda group, i: lazy.element(group, [*i[:axis], picks.element(group, i), *i[axis + 1 :]]),
        shape,
        source.dtype,
        cost=4,
        pointwise=False,
    )
    return [values, places]


def _ranks(ctx: Context, lazy: Lazy, axis: int, largest: bool) -> Lazy:
    """For every element, how many along the axis come before it; equal ones in the order of their index."""

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, dims.expression(lazy.shape[axis])), "k")

        def element(indices: Sequence[Index]) -> Any:
            mine = lazy.element(group, indices)
            other = lazy.element(group, [*indices[:axis], k.var, *indices[axis + 1 :]])
            better = other > mine if largest else other < mine
            before = tirx.Or(better, tirx.And(other == mine, k.var < indices[axis]))
            return te.sum(tirx.Select(before, tirx.const(1, "int64"), tirx.const(0, "int64")), axis=k)

        return [compute(lazy.shape, element, "rank")]

    return ctx.lazy(ctx.kernel("ranks", [(lazy.shape, "int64")], build, kind="reduce")[0])


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "ReduceSum": reduce_with("sum"),
    "ReduceMax": reduce_with("max"),
    "ReduceMin": reduce_with("min"),
    "ReduceProd": reduce_with("prod"),
    "ReduceMean": reduce_with("sum", finish=_mean, cost=3),
    "ReduceL1": reduce_with("sum", _absolute),
    "ReduceL2": reduce_with("sum", lambda x: x * x, _square_root, cost=4),
    "ReduceSumSquare": reduce_with("sum", lambda x: x * x),
    "ReduceLogSum": reduce_with("sum", finish=lambda x, n: scalar.log(x), cost=14),
    "ReduceLogSumExp": log_sum_exp,
    "ArgMax": arg_extreme(largest=True),
    "ArgMin": arg_extreme(largest=False),
    "CumSum": cumulative_sum,
    "LpNormalization": lp_normalization,
    "TopK": top_k,
}
