"""Pad: constant, reflected, edge or wrapped borders, and cropping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import attributes, dims, dtypes
from kbitc.targets.lower.attributes import axis_of, known_dims, known_ints
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.ops.movement import dim_is, remap
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Value


def pad(ctx: Context, node: ir.Node) -> Value:
    """Pad with a constant, reflected, edge or wrapped elements; negative pads crop."""
    source: Value = attributes.value(ctx, node, 0)
    rank = len(source.shape)
    pads = known_dims(ctx, node, 1, "pads")
    if pads is None:
        pads = list(node.attributes.get_ints("pads", node.attributes.get_ints("paddings", ())))
    axes = known_ints(ctx, node, 3, "axes")
    axes = list(range(rank)) if axes is None else [axis_of(node, axis, rank) for axis in axes]
    mode = node.attributes.get_string("mode", "constant")
    before: list[Dim] = [0] * rank
    after: list[Dim] = [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    fill = attributes.optional(ctx, node, 2)
    if fill is None:
        default = node.attributes.get_float("value", 0.0)
        fill = Constant(np.array(default, dtypes.numpy_type(source.dtype)), source.dtype)
    return padded(ctx, node, source, before, after, mode, ctx.reshape(fill, ()))


def padded(
    ctx: Context, node: ir.Node, source: Value, before: Sequence[Dim], after: Sequence[Dim], mode: str, fill: Value
) -> Value:
    """The value with more (or, for negative numbers, fewer) elements before and after along every axis."""
    shape = [dims.simplify(dim + b + a) for dim, b, a in zip(source.shape, before, after, strict=True)]
    if mode == "constant":
        return _constant_pad(ctx, source, before, shape, ctx.lazy(fill))
    if mode not in ("reflect", "edge", "wrap"):
        raise refuse(node, "unknown mode of Pad", got=mode)
    sizes = source.shape

    def index(indices: Sequence[Index]) -> Sequence[Index]:
        own = []
        for i, size, start, grown in zip(indices, sizes, before, shape, strict=True):
            own.append(i if dims.equal(size, grown) and dim_is(start, 0) else _mirrored(i - start, size, mode))
        return own

    return remap(ctx, source, shape, index, repeats=True)


def _mirrored(position: Expr, size: Dim, mode: str) -> Expr:
    last = dims.expression(dims.simplify(size - 1))
    if mode == "edge":
        return tirx.max(tirx.min(position, last), dims.expression(0))
    if mode == "wrap":
        return tirx.floormod(position, dims.expression(size))
    # Reflection without repeating the border has period 2 * (size - 1).
    period = tirx.max(last * 2, dims.expression(1))
    folded = tirx.floormod(position, period)
    return tirx.min(folded, period - folded) if not dim_is(size, 1) else dims.expression(0)


def _constant_pad(ctx: Context, source: Value, before: Sequence[Dim], shape: Sequence[Dim], fill: Lazy) -> Value:
    lazy = ctx.lazy(source)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        own, inside = [], []
        for i, size, start, grown in zip(indices, lazy.shape, before, shape, strict=True):
            place = i if dim_is(start, 0) else i - start
            own.append(place)
            if not dim_is(start, 0):
                inside.append(place >= 0)
            if not dims.equal(dims.simplify(grown - start), size):
                inside.append(place < dims.expression(size))
        value = lazy.element(group, own)
        return value if not inside else tirx.if_then_else(tirx.all(*inside), value, fill.element(group, ()))

    return Lazy(element, tuple(shape), lazy.dtype, lazy.cost + 2, pointwise=False)


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Pad": pad}
