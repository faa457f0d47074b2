"""Pools, local and global, with channels first (ONNX) or last (kbitc.core)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.group import Group, TeTensor, compute, named
from kbitc.targets.lower.ops.reduce import reduced
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Value
from kbitc.targets.lower.windows import Window, all_of, read_window

Emit = Callable[[Context, ir.Node], Any]


def _spatial(rank: int, channels_last: bool) -> range:
    """Axes of the spatial dimensions."""
    return range(1, rank - 1) if channels_last else range(2, rank)


def _window(ctx: Context, node: ir.Node, x: Value, channels_last: bool) -> Window:
    kernel = node.attributes.get_ints("kernel_shape")
    if kernel is None:
        raise refuse(node, "kernel_shape is missing", remedy="repair the model")
    sizes = [x.shape[axis] for axis in _spatial(len(x.shape), channels_last)]
    return read_window(node, sizes, [int(k) for k in kernel], ceil_mode=node.attributes.get_int("ceil_mode", 0) == 1)


def _slide(
    ctx: Context,
    x: Value,
    window: Window,
    channels_last: bool,
    reducer: Any,
    outside: Callable[[str], Expr],
    prepare: Callable[[Expr], Expr] | None = None,
) -> Value:
    """reducer over the taps of every window. 16-bit floats are reduced in float32."""
    wide = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    lazy = ctx.lazy(ctx.tensor(x))
    first, last = x.shape[0], x.shape[-1] if channels_last else x.shape[1]
    shape = (first, *window.out, last) if channels_last else (first, last, *window.out)

    def build(group: Group) -> list[TeTensor]:
        taps = [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(window.kernel)]

        def element(indices: Sequence[Index]) -> Any:
            out = indices[1:-1] if channels_last else indices[2:]
            places = window.positions(out, [tap.var for tap in taps])
            own = [indices[0], *places, indices[-1]] if channels_last else [indices[0], indices[1], *places]
            value = scalar.cast(lazy.element(group, own), wide)
            value = value if prepare is None else named(value, prepare)
            inside = all_of(window.inside(places))
            if inside is not None:
                value = tirx.if_then_else(inside, value, outside(wide))
            return reducer(value, axis=taps)

        return [compute(shape, element, "pool")]

    return ctx.kernel("pool", [(shape, wide)], build, kind="reduce")[0]


def _narrow(ctx: Context, node: ir.Node, value: Value, dtype: str) -> Value:
    if value.dtype == dtype:
        return value
    return elementwise(ctx, node, [value], lambda v: scalar.cast(v, dtype), dtype)


def max_pool(channels_last: bool) -> Emit:
    """An emitter for MaxPool without its Indices output."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            raise refuse(node, "the Indices output of MaxPool cannot be compiled")
        x = attributes.value(ctx, node, 0)
        window = _window(ctx, node, x, channels_last)
        result = _slide(ctx, x, window, channels_last, te.max, lambda dtype: te.min_value(dtype))
        return _narrow(ctx, node, result, x.dtype)

    return emit


def average_pool(channels_last: bool) -> Emit:
    """An emitter for AveragePool."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        x = attributes.value(ctx, node, 0)
        window = _window(ctx, node, x, channels_last)
        total = _slide(ctx, x, window, channels_last, te.sum, lambda dtype: tirx.const(0, dtype))
        include = node.attributes.get_int("count_include_pad", 0) == 1
        source = ctx.lazy(total)

        def element(group: Group, indices: Sequence[Index]) -> Expr:
            out = indices[1:-1] if channels_last else indices[2:]
            value = source.element(group, indices)
            return value / scalar.cast(_count(window, out, include), scalar.dtype_of(value))

        mean = Lazy(element, source.shape, source.dtype, source.cost + 6)
        return _narrow(ctx, node, mean, x.dtype)

    return emit


def _count(window: Window, out: Sequence[Index], include_padding: bool) -> Expr:
    """How many taps of a window count, as an int64 expression."""
    total: Expr = tirx.const(1, "int64")
    low = window.before if include_padding else ()
    high = window.after if include_padding else ()
    for axis, size in enumerate(window.kernel):
        one = Window(*((part[axis],) for part in _parts(window)))
        conditions = [
            one.inside(one.positions([out[axis]], [tap]), low[axis : axis + 1], high[axis : axis + 1])
            for tap in range(size)
        ]
        if not any(conditions):
            total = total * size
            continue
        hits = [tirx.Select(tirx.all(*found), tirx.const(1, "int64"), tirx.const(0, "int64")) for found in conditions]
        total = total * sum(hits[1:], hits[0])
    return total


def _parts(window: Window) -> tuple[tuple[Any, ...], ...]:
    return (
        window.kernel,
        window.strides,
        window.dilations,
        window.before,
        window.after,
        window.sizes,
        window.out,
    )


def lp_pool(ctx: Context, node: ir.Node) -> Value:
    """LpPool: (sum |x|^p)^(1/p)."""
    x = attributes.value(ctx, node, 0)
    order = node.attributes.get_int("p", 2)
    window = _window(ctx, node, x, channels_last=False)
    total = _slide(ctx, x, window, False, te.sum, lambda dtype: tirx.const(0, dtype), lambda v: _power(v, order))
    return _narrow(ctx, node, elementwise(ctx, node, [total], lambda v: _root(v, order), cost=30), x.dtype)


def _power(x: Expr, order: int) -> Expr:
    result = tirx.abs(x)
    for _ in range(order - 1):
        result = result * tirx.abs(x)
    return result


def _root(x: Expr, order: int) -> Expr:
    if order <= 2:
        return x if order == 1 else tirx.sqrt(x)
    from kbitc.targets.lower.ops.elementwise import pow_expression

    return pow_expression(x, tirx.const(1.0 / order, scalar.dtype_of(x)))


def global_pool(kind: str, channels_last: bool) -> Emit:
    """An emitter for GlobalAveragePool, GlobalMaxPool or GlobalLpPool."""

    def emit(ctx: Context, node: ir.Node) -> Value:
        x = attributes.value(ctx, node, 0)
        axes = list(_spatial(len(x.shape), channels_last))
        order = node.attributes.get_int("p", 2)
        count = dims.expression(dims.product(x.shape[axis] for axis in axes))
        prepare = (lambda v: _power(v, order)) if kind == "lp" else None
        result = reduced(ctx, x, axes, "max" if kind == "max" else "sum", prepare, f"global_{kind}_pool")

        def finish(v: Expr) -> Expr:
            if kind == "average":
                v = v / scalar.cast(count, scalar.dtype_of(v))
            return scalar.cast(_root(v, order) if kind == "lp" else v, x.dtype)

        done = (
            result
            if kind == "max" and result.dtype == x.dtype
            else elementwise(ctx, node, [result], finish, x.dtype, 3)
        )
        return ctx.reshape(done, tuple(1 if axis in axes else dim for axis, dim in enumerate(x.shape)))

    return emit


TABLE: dict[str, Emit] = {
    "MaxPool": max_pool(False),
    "AveragePool": average_pool(False),
    "LpPool": lp_pool,
    "GlobalAveragePool": global_pool("average", False),
    "GlobalMaxPool": global_pool("max", False),
    "GlobalLpPool": global_pool("lp", False),
}
CORE_TABLE: dict[str, Emit] = {
    "MaxPoolNHWC": max_pool(True),
    "AveragePoolNHWC": average_pool(True),
    "GlobalAveragePoolNHWC": global_pool("average", True),
    "GlobalMaxPoolNHWC": global_pool("max", True),
}
