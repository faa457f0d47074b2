"""Operators that read or write at indices computed at run time: Gather, GatherElements, GatherND, Scatter*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims
from kbitc.targets.lower.attributes import axis_of
from kbitc.targets.lower.broadcast import REPEATED_COST
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Value


def inside(position: Expr, size: Dim) -> Expr:
    """An index as int64 in [0, size): negative ones count from the end, and none reads outside the tensor."""
    wide = tirx.Cast("int64", position) if str(position.ty.dtype) != "int64" else position
    last = dims.expression(dims.simplify(size - 1))
    wrapped = tirx.Select(wide < 0, wide + dims.expression(size), wide)
    return tirx.max(tirx.min(wrapped, last), dims.expression(0))


def _repeated(ctx: Context, value: Value) -> Lazy:
    lazy = ctx.lazy(value)
    return ctx.lazy(ctx.tensor(lazy)) if lazy.cost > REPEATED_COST else lazy


def gather(ctx: Context, node: ir.Node) -> Value:
    """Gather along one axis."""
    data, where = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(data.shape))
    source, picks = _repeated(ctx, data), _repeated(ctx, where)
    shape = (*data.shape[:axis], *where.shape, *data.shape[axis + 1 :])
    rank = len(where.shape)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        position = inside(picks.element(group, indices[axis : axis + rank]), data.shape[axis])
        return source.element(group, [*indices[:axis], position, *indices[axis + rank :]])

    return Lazy(element, shape, data.dtype, source.cost + picks.cost + 3, pointwise=False)


def gather_elements(ctx: Context, node: ir.Node) -> Value:
    """GatherElements."""
    data, where = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(data.shape))
    source, picks = _repeated(ctx, data), _repeated(ctx, where)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        own = list(indices)
        own[axis] = inside(picks.element(group, indices), data.shape[axis])
        return source.element(group, own)

    return Lazy(element, where.shape, data.dtype, source.cost + picks.cost + 3, pointwise=False)


def gather_nd(ctx: Context, node: ir.Node) -> Value:
    """GatherND with batch dimensions."""
    data, where = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    batch = node.attributes.get_int("batch_dims", 0)
    depth = attributes.static_shape(node, where.shape[-1:], "the last dimension of the indices")[0]
    source, picks = _repeated(ctx, data), _repeated(ctx, where)
    lead = len(where.shape) - 1
    shape = (*where.shape[:-1], *data.shape[batch + depth :])

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        place = [
            inside(picks.element(group, [*indices[:lead], tirx.IntImm("int64", d)]), data.shape[batch + d])
            for d in range(depth)
        ]
        return source.element(group, [*indices[:batch], *place, *indices[lead:]])

    return Lazy(element, shape, data.dtype, source.cost + depth * (picks.cost + 3), pointwise=False)


_COMBINE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": tirx.max,
    "min": tirx.min,
}


def scatter_elements(ctx: Context, node: ir.Node) -> Value:
    """ScatterElements (and the old Scatter): every element of the result looks for the updates that hit it."""
    data, where, updates = (attributes.value(ctx, node, index) for index in range(3))
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(data.shape))
    combine = _combiner(node)
    old, picks, new = _repeated(ctx, data), _repeated(ctx, where), _repeated(ctx, updates)
    count = where.shape[axis]

    def hit(group: Group, indices: Sequence[Index], j: Expr) -> tuple[Expr, Expr]:
        own = [*indices[:axis], j, *indices[axis + 1 :]]
        others = [
            indices[place] < dims.expression(dim)
            for place, dim in enumerate(where.shape)
            if place != axis and not dims.equal(dim, data.shape[place])
        ]
        zero = dims.expression(0)
        safe = [tirx.min(i, dims.expression(dims.simplify(d - 1))) for i, d in zip(own, where.shape, strict=True)]
        safe = [tirx.max(i, zero) for i in safe]
        found = inside(picks.element(group, safe), data.shape[axis])
        return tirx.all(found == indices[axis], *others), new.element(group, safe)

    return _search(ctx, data, old, count, hit, combine)


def scatter_nd(ctx: Context, node: ir.Node) -> Value:
    """ScatterND: every element of the result looks for the updates that hit it."""
    data, where, updates = (attributes.value(ctx, node, index) for index in range(3))
    depth = attributes.static_shape(node, where.shape[-1:], "the last dimension of the indices")[0]
    combine = _combiner(node)
    old, picks, new = _repeated(ctx, data), _repeated(ctx, where), _repeated(ctx, updates)
    lead = where.shape[:-1]
    count = dims.product(lead)

    def hit(group: Group, indices: Sequence[Index], j: Expr) -> tuple[Expr, Expr]:
        place: list[Index] = []
        rest = j
        for dim in reversed(lead):
            place.insert(0, tirx.floormod(rest, dims.expression(dim)))
            rest = tirx.floordiv(rest, dims.expression(dim))
        matches = []
        for d in range(depth):
            found = inside(picks.element(group, [*place, tirx.IntImm("int64", d)]), data.shape[d])
            matches.append(found == indices[d])
        return tirx.all(*matches), new.element(group, [*place, *indices[depth:]])

    return _search(ctx, data, old, count, hit, combine)


def _combiner(node: ir.Node) -> Callable[[Expr, Expr], Expr]:
    reduction = node.attributes.get_string("reduction", "none")
    if reduction not in _COMBINE:
        raise refuse(node, "unknown reduction", got=reduction, remedy="repair the model")
    return _COMBINE[reduction]


def _search(
    ctx: Context,
    data: Value,
    old: Lazy,
    count: Dim,
    hit: Callable[[Group, Sequence[Index], Expr], tuple[Expr, Expr]],
    combine: Callable[[Expr, Expr], Expr],
) -> Value:
    """A loop over updates for every element: quadratic, but free of races and in the order of the updates.

    A reduction over pairs (was hit, value): the identity is "not hit", and two hits combine in order.
    """
    dtype = data.dtype

    def join(a: Sequence[Expr], b: Sequence[Expr]) -> tuple[Expr, Expr]:
        both = tirx.Select(a[0] != 0, combine(a[1], b[1]), b[1])
        return tirx.max(a[0], b[0]), tirx.Select(b[0] != 0, both, a[1])

    def start(*types: str) -> tuple[Expr, Expr]:
        return tirx.const(0, types[0]), tirx.const(0, types[1])

    reducer = te.comm_reducer(join, start, name="last")

    def build(group: Group) -> list[TeTensor]:
        j = te.reduce_axis((0, count), "j")

        def pair(*indices: Index) -> Any:
            matched, value = hit(group, indices, j.var)
            return reducer((tirx.Cast("int32", matched), value), axis=j)

        found, value = te.compute(tuple(data.shape), pair, name="updates")

        def element(indices: Sequence[Index]) -> Expr:
            before = old.element(group, indices)
            return tirx.Select(found(*indices) != 0, combine(before, value(*indices)), before)

        return [compute(data.shape, element, "scatter")]

    return ctx.kernel("scatter", [(tuple(data.shape), dtype)], build, kind="general")[0]


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
}
