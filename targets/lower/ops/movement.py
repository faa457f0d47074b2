"""Operators that move elements without computing: Reshape, Transpose, Concat, Slice, Expand and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import tirx

from kbitc.graph.shape_rules import TO_THE_END
from kbitc.targets.lower import attributes, dims
from kbitc.targets.lower.attributes import axis_of, known_dims, known_ints
from kbitc.targets.lower.broadcast import REPEATED_COST, stretch
from kbitc.targets.lower.context import Context, number
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Value


def remap(
    ctx: Context,
    source: Value,
    shape: Sequence[Dim],
    index: Callable[[Sequence[Index]], Sequence[Index]],
    *,
    repeats: bool = False,
) -> Lazy:
    """A value whose elements are elements of `source` at other indices.

    Args:
        ctx: the lowering.
        source: what is read.
        shape: of the result.
        index: result indices -> source indices.
        repeats: source elements are read several times, so that a costly source goes to memory first.
    """
    lazy = ctx.lazy(source)
    if repeats and lazy.cost > REPEATED_COST:
        lazy = ctx.lazy(ctx.tensor(lazy))
    element = lazy.element
    return Lazy(
        lambda group, indices: element(group, index(indices)), tuple(shape), lazy.dtype, lazy.cost + 1, pointwise=False
    )


def reshape_target(node: ir.Node, shape: Sequence[Dim], wanted: Sequence[Dim], allow_zero: bool) -> tuple[Dim, ...]:
    """The shape that Reshape means: 0 copies a dimension, -1 takes what is left.

    Raises:
        UnsupportedError: when the sizes differ for certain.
    """
    result: list[Dim] = list(wanted)
    for axis, dim in enumerate(result):
        if dims.is_static(dim) and dim == 0 and not allow_zero:
            if axis >= len(shape):
                raise refuse(
                    node, "Reshape copies a dimension that the input lacks", got=axis, remedy="repair the model"
                )
            result[axis] = shape[axis]
    if any(dims.is_static(dim) and dim == -1 for dim in result):
        rest = next(axis for axis, dim in enumerate(result) if dims.is_static(dim) and dim == -1)
        others = [dim for axis, dim in enumerate(result) if axis != rest]
        if not any(dims.is_static(dim) and dim == 0 for dim in others):
            result[rest] = dims.divide_exactly(shape, others)
    have, want = dims.product(shape), dims.product(result)
    if dims.is_static(have) and dims.is_static(want) and have != want:
        raise refuse(node, "Reshape to another number of elements", got=f"{dims.text(shape)} to {dims.text(wanted)}")
    return tuple(result)


def reshape(ctx: Context, node: ir.Node) -> Value:
    """Reshape to a known shape."""
    source = attributes.value(ctx, node, 0)
    wanted = known_dims(ctx, node, 1, "the shape of a Reshape")
    if wanted is None:
        wanted = list(node.attributes.get_ints("shape", ()))
    allow_zero = node.attributes.get_int("allowzero", 0) == 1
    return ctx.reshape(source, reshape_target(node, source.shape, wanted, allow_zero))


def flatten(ctx: Context, node: ir.Node) -> Value:
    """Flatten to a matrix."""
    source = attributes.value(ctx, node, 0)
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(source.shape) if axis < 0 else axis
    return ctx.reshape(source, (dims.product(source.shape[:axis]), dims.product(source.shape[axis:])))


def squeeze(ctx: Context, node: ir.Node) -> Value:
    """Squeeze; without axes every dimension that is the number 1 goes."""
    source = attributes.value(ctx, node, 0)
    axes = known_ints(ctx, node, 1, "axes")
    if axes is None:
        given = node.attributes.get_ints("axes")
        axes = list(given) if given is not None else [i for i, dim in enumerate(source.shape) if dim_is(dim, 1)]
    gone = attributes.axes_of(node, axes, len(source.shape))
    target = [1 if axis in gone else dim for axis, dim in enumerate(source.shape)]
    if any(dims.is_static(source.shape[axis]) and source.shape[axis] != 1 for axis in gone):
        raise refuse(
            node, "Squeeze of a dimension that is not 1", got=dims.text(source.shape), remedy="repair the model"
        )
    seen = ctx.cast_shape(source, target)
    return ctx.reshape(seen, tuple(dim for axis, dim in enumerate(target) if axis not in gone))


def dim_is(dim: Dim, value: int) -> bool:
    """Whether a dimension is that number."""
    return dims.is_static(dim) and bool(dim == value)


def unsqueeze(ctx: Context, node: ir.Node) -> Value:
    """Unsqueeze."""
    source = attributes.value(ctx, node, 0)
    axes = known_ints(ctx, node, 1, "axes")
    axes = list(node.attributes.get_ints("axes", ())) if axes is None else axes
    rank = len(source.shape) + len(axes)
    new = attributes.axes_of(node, axes, rank)
    old = iter(source.shape)
    return ctx.reshape(source, tuple(1 if axis in new else next(old) for axis in range(rank)))


def transposed(ctx: Context, source: Value, order: Sequence[int]) -> Value:
    """The value with its axes in another order: result axis i is source axis order[i]."""
    if list(order) == list(range(len(order))):
        return source
    shape = tuple(source.shape[axis] for axis in order)
    kept = [axis for axis in order if not dim_is(source.shape[axis], 1)]
    if kept == sorted(kept):
        return ctx.reshape(source, shape)  # only dimensions of size 1 move: the elements stay where they are
    position = [list(order).index(axis) for axis in range(len(order))]
    return remap(ctx, source, shape, lambda indices: [indices[place] for place in position])


def transpose(ctx: Context, node: ir.Node) -> Value:
    """Transpose; without perm the axes are reversed."""
    source = attributes.value(ctx, node, 0)
    order = node.attributes.get_ints("perm") or list(range(len(source.shape)))[::-1]
    return transposed(ctx, source, [int(axis) for axis in order])


def concat(ctx: Context, node: ir.Node) -> Value:
    """Concat: a chain of choices by the index along the axis."""
    sources = [attributes.value(ctx, node, index) for index in range(len(node.inputs))]
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(sources[0].shape))
    parts = [source for source in sources if not dim_is(source.shape[axis], 0)] or sources[:1]
    shape = list(parts[0].shape)
    for part in parts[1:]:
        for other in range(len(shape)):
            if other != axis and dims.is_static(part.shape[other]):
                shape[other] = part.shape[other]
    seen = [ctx.cast_shape(part, [*shape[:axis], part.shape[axis], *shape[axis + 1 :]]) for part in parts]
    shape[axis] = _total([part.shape[axis] for part in parts])
    lazies = [ctx.lazy(part) for part in seen]

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return _choose_part(group, lazies, axis, indices)

    cost = max(lazy.cost for lazy in lazies) + len(lazies)
    return Lazy(element, tuple(shape), sources[0].dtype, cost, pointwise=False)


def _total(sizes: Sequence[Dim]) -> Dim:
    total: Dim = 0
    for size in sizes:
        total = size if dim_is(total, 0) else total + size
    return dims.simplify(total)


def _choose_part(group: Group, parts: Sequence[Lazy], axis: int, indices: Sequence[Index]) -> Expr:
    """The element of a concatenation: each part guards the reads of its own memory."""
    starts: list[Dim] = [0]
    for part in parts[:-1]:
        starts.append(_total([starts[-1], part.shape[axis]]))
    result = None
    for start, part in reversed(list(zip(starts, parts, strict=True))):
        own = list(indices)
        own[axis] = indices[axis] if dim_is(start, 0) else indices[axis] - start
        value = part.element(group, own)
        end = _total([start, part.shape[axis]])
        result = value if result is None else tirx.if_then_else(indices[axis] < end, value, result)
    return result


def split(ctx: Context, node: ir.Node) -> list[Value]:
    """Split into parts of given sizes, or into equal ones."""
    source = attributes.value(ctx, node, 0)
    axis = axis_of(node, node.attributes.get_int("axis", 0), len(source.shape))
    sizes: list[Dim] | None = known_dims(ctx, node, 1, "the sizes of a Split")
    if sizes is None:
        sizes = list(node.attributes.get_ints("split", ())) or None
    if sizes is None:
        count, length = len(node.outputs), source.shape[axis]
        if dims.is_static(length):
            chunk = -(-length // count)
            sizes = [min(chunk, max(0, length - chunk * index)) for index in range(count)]
        else:
            sizes = [dims.floor_divide(length, count)] * count
    results: list[Value] = []
    start: Dim = 0
    for size in sizes:
        results.append(window(ctx, source, axis, start, size))
        start = _total([start, size])
    return results


def window(ctx: Context, source: Value, axis: int, start: Dim, size: Dim, step: int = 1) -> Value:
    """Elements start, start + step, ... (size of them) along an axis."""
    if dim_is(start, 0) and step == 1 and dims.equal(size, source.shape[axis]):
        return source
    shape = [*source.shape[:axis], size, *source.shape[axis + 1 :]]

    def index(indices: Sequence[Index]) -> Sequence[Index]:
        own = list(indices)
        scaled = own[axis] if step == 1 else own[axis] * step
        own[axis] = scaled if dim_is(start, 0) else scaled + start
        return own

    return remap(ctx, source, shape, index)


def slice_(ctx: Context, node: ir.Node) -> Value:
    """Slice with any steps; bounds are clamped as ONNX says."""
    source: Value = attributes.value(ctx, node, 0)
    starts, ends = known_dims(ctx, node, 1, "starts"), known_dims(ctx, node, 2, "ends")
    if starts is None or ends is None:
        starts = list(node.attributes.get_ints("starts", ()))
        ends = list(node.attributes.get_ints("ends", ()))
    axes = known_ints(ctx, node, 3, "axes")
    if axes is None:
        axes = list(node.attributes.get_ints("axes", range(len(starts))))
    steps = known_ints(ctx, node, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis_of(node, axis, len(source.shape))
        first, count = slice_range(node, source.shape[place], start, end, step)
        source = window(ctx, source, place, first, count, step)
    return source


def slice_range(node: ir.Node, size: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, Dim]:
    """First index and count of a slice start:end:step of a dimension."""
    if step == 0:
        raise refuse(node, "a Slice of step 0", remedy="repair the model")
    if step > 0:
        low, high = _clamped(size, start, 0, size), _clamped(size, end, 0, size)
        span = dims.simplify(high - low)
    else:
        top = dims.simplify(size - 1)
        low, high = _clamped(size, start, 0, top), _clamped(size, end, -1, top)
        span = dims.simplify(low - high)
    return low, dims.maximum(0, dims.ceil_divide(span, abs(step)))


def _clamped(size: Dim, position: Dim, lowest: int, highest: Dim) -> Dim:
    """A slice bound: negative ones count from the end, and all are limited to [lowest, highest]."""
    if dims.is_static(position):
        if position < 0:
            if dims.is_static(size):
                position = max(position + size, lowest)
            elif position <= -TO_THE_END:
                return lowest
            else:
                return dims.maximum(lowest, size + position)
        if position >= TO_THE_END:
            return highest
    elif not dims.provably(position >= 0):
        position = tirx.Select(position < 0, position + size, position)
        position = dims.maximum(lowest, position)
    return dims.minimum(position, highest)


def expand(ctx: Context, node: ir.Node) -> Value:
    """Expand: broadcasting in both directions."""
    source = attributes.value(ctx, node, 0)
    wanted = known_dims(ctx, node, 1, "the shape of an Expand") or []
    rank = max(len(wanted), len(source.shape))
    target = [1] * (rank - len(wanted)) + wanted
    for axis, dim in enumerate(source.shape, start=rank - len(source.shape)):
        if dim_is(target[axis], 1):
            target[axis] = dim
        elif dims.is_static(dim) and dim != 1 and dims.is_static(target[axis]) and dim != target[axis]:
            raise refuse(node, "shapes do not broadcast", got=f"{dims.text(source.shape)} to {dims.text(wanted)}")
    return stretch(ctx, source, target)


def tile(ctx: Context, node: ir.Node) -> Value:
    """Tile by known repeats."""
    source = attributes.value(ctx, node, 0)
    repeats = known_dims(ctx, node, 1, "repeats") or []
    shape = [dims.product([dim, times]) for dim, times in zip(source.shape, repeats, strict=True)]

    def index(indices: Sequence[Index]) -> Sequence[Index]:
        pairs = zip(indices, source.shape, repeats, strict=True)
        return [i if dim_is(times, 1) else tirx.floormod(i, dims.expression(size)) for i, size, times in pairs]

    return remap(ctx, source, shape, index, repeats=True)


def depth_to_space(ctx: Context, node: ir.Node) -> Value:
    """DepthToSpace in DCR or CRD order."""
    source = attributes.value(ctx, node, 0)
    n, c, h, w = source.shape
    block = node.attributes.get_int("blocksize", 1)
    depth = dims.floor_divide(c, block * block)
    crd = node.attributes.get_string("mode", "DCR") == "CRD"
    split_shape = (n, depth, block, block, h, w) if crd else (n, block, block, depth, h, w)
    order = [0, 1, 4, 2, 5, 3] if crd else [0, 3, 4, 1, 5, 2]
    moved = transposed(ctx, ctx.reshape(source, split_shape), order)
    return ctx.reshape(moved, (n, depth, dims.product([h, block]), dims.product([w, block])))


def space_to_depth(ctx: Context, node: ir.Node) -> Value:
    """SpaceToDepth."""
    source = attributes.value(ctx, node, 0)
    n, c, h, w = source.shape
    block = node.attributes.get_int("blocksize", 1)
    high, wide = dims.floor_divide(h, block), dims.floor_divide(w, block)
    moved = transposed(ctx, ctx.reshape(source, (n, c, high, block, wide, block)), [0, 3, 5, 1, 2, 4])
    return ctx.reshape(moved, (n, dims.product([c, block * block]), high, wide))


def filled(shape: Sequence[Dim], item: Any, dtype: str) -> Lazy:
    """A value that is the same number everywhere."""
    return Lazy(lambda group, indices: number(item, dtype), tuple(shape), dtype, cost=0)


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Expand": expand,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
