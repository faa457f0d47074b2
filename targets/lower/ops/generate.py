"""Operators that make values from shapes and indices: Shape, Range, ConstantOfShape, OneHot, Trilu, EyeLike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import attributes, dims, dtypes, known
from kbitc.targets.lower.attributes import axis_of, known_dims
from kbitc.targets.lower.context import Context, number
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.ops.movement import filled
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Value


def shape_of(ctx: Context, node: ir.Node) -> Value:
    """Shape, with start and end."""
    source = attributes.value(ctx, node, 0)
    rank = len(source.shape)
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", rank)
    low = min(max(start + rank if start < 0 else start, 0), rank)
    high = min(max(end + rank if end < 0 else end, low), rank)
    return known.make(source.shape[low:high], (high - low,), "int64")


def size_of(ctx: Context, node: ir.Node) -> Value:
    """Size: the number of elements."""
    return known.make([dims.product(attributes.value(ctx, node, 0).shape)], (), "int64")


def constant_of_shape(ctx: Context, node: ir.Node) -> Value:
    """ConstantOfShape of a known shape."""
    shape = known_dims(ctx, node, 0, "the shape of a ConstantOfShape") or []
    tensor = node.attributes.get_tensor("value")
    if tensor is None:
        return filled(shape, 0.0, "float32")
    array, dtype = dtypes.from_tensor(tensor, node.name or "ConstantOfShape")
    return filled(shape, array.reshape(-1)[0], dtype)


def range_(ctx: Context, node: ir.Node) -> Value:
    """Range whose ends are known up to symbolic dimensions; floats must be whole numbers, as cast sizes are."""
    start, limit, step = (attributes.known(ctx, node, index, "the ends of a Range") for index in range(3))
    if start is None or limit is None or step is None:
        raise refuse(node, "Range needs three inputs", remedy="repair the model")
    ends = [array.reshape(-1)[0] for array in (start, limit, step)]
    dtype = attributes.value(ctx, node, 0).dtype
    first, last, stride = (_whole(item) for item in ends)
    if first is None or last is None or not stride or not dims.is_static(stride):
        shown = ", ".join(map(str, ends))
        raise refuse(node, "Range with these ends", got=shown, remedy="fix the shape with --shape")
    span = dims.simplify(last - first) if stride > 0 else dims.simplify(first - last)
    count = dims.maximum(0, dims.ceil_divide(span, abs(stride)))
    return Lazy(
        lambda group, indices: number(dims.expression(first) + indices[0] * stride, dtype), (count,), dtype, cost=1
    )


def _whole(item: Any) -> Dim | None:
    """A number or expression as a dimension; None when it need not be whole."""
    if known.is_expression(item):
        plain = item.value if isinstance(item, tirx.Cast) else item
        return dims.as_dim(plain) if str(plain.ty.dtype) == "int64" else None
    return int(item) if float(item).is_integer() else None


def one_hot(ctx: Context, node: ir.Node) -> Value:
    """OneHot; depth must be known; negative indices count from the end, others outside give all off."""
    where, values = attributes.value(ctx, node, 0), attributes.value(ctx, node, 2)
    depth = (known_dims(ctx, node, 1, "the depth of a OneHot") or [0])[0]
    depth = dims.as_dim(depth) if known.is_expression(depth) else int(depth)
    rank = len(where.shape) + 1
    axis = axis_of(node, node.attributes.get_int("axis", -1), rank)
    shape = (*where.shape[:axis], depth, *where.shape[axis:])
    picks, table = ctx.lazy(where), ctx.lazy(values)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        found = tirx.Cast("int64", picks.element(group, [*indices[:axis], *indices[axis + 1 :]]))
        size = dims.expression(depth)
        hit = tirx.Or(found == indices[axis], found + size == indices[axis])
        off, on = (table.element(group, (tirx.IntImm("int64", place),)) for place in (0, 1))
        return tirx.Select(hit, on, off)

    return Lazy(element, shape, values.dtype, picks.cost + 4, pointwise=False)


def trilu(ctx: Context, node: ir.Node) -> Value:
    """Trilu: the upper or lower triangle, zeros elsewhere."""
    source = ctx.lazy(attributes.value(ctx, node, 0))
    diagonal = known_dims(ctx, node, 1, "the diagonal of a Trilu") or [0]
    upper = node.attributes.get_int("upper", 1) == 1

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        row, column = indices[-2], indices[-1]
        offset = column - row
        inside = offset >= diagonal[0] if upper else offset <= diagonal[0]
        value = source.element(group, indices)
        return tirx.Select(inside, value, tirx.const(0, value.ty.dtype))

    return Lazy(element, source.shape, source.dtype, source.cost + 2, source.pointwise)


def eye_like(ctx: Context, node: ir.Node) -> Value:
    """EyeLike: ones on the k-th diagonal."""
    source = attributes.value(ctx, node, 0)
    to = node.attributes.get_int("dtype")
    dtype = source.dtype if to is None else dtypes.tvm_type(ir.DataType(to), node.name or "EyeLike")
    k = node.attributes.get_int("k", 0)
    return Lazy(
        lambda group, indices: tirx.Select(indices[1] - indices[0] == k, number(1, dtype), number(0, dtype)),
        source.shape,
        dtype,
        cost=2,
    )


def constant(ctx: Context, node: ir.Node) -> Value:
    """A Constant node."""
    for name, attribute in node.attributes.items():
        if name == "value":
            array, dtype = dtypes.from_tensor(attribute.as_tensor(), node.name or "Constant")
            return Constant(array, dtype, node.outputs[0].name or "")
        if name in ("value_int", "value_ints"):
            return known.make(_items(attribute.value), _shape(attribute.value), "int64")
        if name in ("value_float", "value_floats"):
            return known.make(_items(attribute.value), _shape(attribute.value), "float32")
    raise refuse(node, "a Constant of this kind", got=", ".join(node.attributes))


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _shape(value: Any) -> tuple[int, ...]:
    return (len(value),) if isinstance(value, tuple | list) else ()


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "Shape": shape_of,
    "Size": size_of,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "OneHot": one_hot,
    "Trilu": trilu,
    "EyeLike": eye_like,
    "Constant": constant,
}
