"""Evaluation of operators on values that are known while compiling, up to symbolic dimensions.

Exporters compute shapes with the same operators as data: Shape -> Gather -> Concat -> Reshape. Here such values are
numpy object arrays of ints, floats, bools and tvm expressions, and the operators run on them element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import dims, dtypes
from kbitc.targets.lower.attributes import axis_of, known_ints, present
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant

Array = npt.NDArray[Any]
Item = Any  # int, float, bool or a tvm expression
# Larger arrays are data, not shapes.
LARGEST = 1024


def is_expression(item: Item) -> bool:
    """Whether an element depends on symbolic dimensions."""
    return not isinstance(item, int | float | bool | np.generic)


def make(items: Any, shape: Sequence[int], dtype: str) -> Constant:
    """A constant from a flat list of elements; plain numpy where no element is symbolic."""
    flat = list(items)
    if not any(is_expression(item) for item in flat):
        return Constant(np.array(flat, dtype=dtypes.numpy_type(dtype)).reshape(tuple(shape)), dtype)
    array = np.empty(len(flat), dtype=object)
    for index, item in enumerate(flat):
        array[index] = item
    return Constant(array.reshape(tuple(shape)), dtype)


def _objects(value: Constant) -> Array:
    return value.array if value.is_symbolic else value.array.astype(object)


def _tidy(item: Item) -> Item:
    if is_expression(item) and str(item.ty.dtype) == "int64":
        return dims.simplify(item)
    return item


def _divide(a: Item, b: Item) -> Item:
    if not is_expression(a) and not is_expression(b):
        if isinstance(a, float) or isinstance(b, float):
            return a / b if b else math.nan
        if not b:
            return 0
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    if _is_float(a) or _is_float(b):
        return _as_float(a) / _as_float(b)
    # Sizes are not negative, so floor and truncation agree.
    return dims.floor_divide(a, b)


def _modulo(a: Item, b: Item) -> Item:
    if not is_expression(a) and not is_expression(b):
        return a % b
    return tirx.floormod(dims.expression(a), dims.expression(b))


def _is_float(item: Item) -> bool:
    return isinstance(item, float) or (is_expression(item) and dtypes.is_float(str(item.ty.dtype)))


def _as_float(item: Item) -> Item:
    if is_expression(item):
        return item if _is_float(item) else tirx.Cast("float32", item)
    return tirx.const(float(item), "float32")


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Item, Item], Item]:
    def apply(a: Item, b: Item) -> Item:
        if is_expression(a) or is_expression(b):
            if _is_float(a) or _is_float(b):
                return function(_as_float(a), _as_float(b))
            return function(dims.expression(a), dims.expression(b))
        return function(a, b)

    return apply


def _larger(a: Item, b: Item) -> Item:
    return tirx.max(a, b) if is_expression(a) or is_expression(b) else max(a, b)


def _smaller(a: Item, b: Item) -> Item:
    return tirx.min(a, b) if is_expression(a) or is_expression(b) else min(a, b)


def _equal(a: Item, b: Item) -> Item:
    if not is_expression(a) and not is_expression(b):
        return a == b
    if _is_float(a) or _is_float(b):
        return tirx.EQ(_as_float(a), _as_float(b))
    if dims.equal(a, b):
        return True
    return False if dims.never_equal(a, b) else tirx.EQ(dims.expression(a), dims.expression(b))


def _ordered(function: Callable[[Any, Any], Any], opposite: Callable[[Any, Any], Any]) -> Callable[[Item, Item], Item]:
    def apply(a: Item, b: Item) -> Item:
        if not is_expression(a) and not is_expression(b):
            return function(a, b)
        if _is_float(a) or _is_float(b):
            return function(_as_float(a), _as_float(b))
        condition = function(dims.expression(a), dims.expression(b))
        if dims.provably(condition):
            return True
        return False if dims.provably(opposite(dims.expression(a), dims.expression(b))) else condition

    return apply


def _logical(function: Callable[[Any, Any], Any], plain: Callable[[bool, bool], bool]) -> Callable[[Item, Item], Item]:
    def apply(a: Item, b: Item) -> Item:
        if not is_expression(a) and not is_expression(b):
            return plain(bool(a), bool(b))
        return function(*(item if is_expression(item) else tirx.const(bool(item), "bool") for item in (a, b)))

    return apply


def _choose(condition: Item, yes: Item, no: Item) -> Item:
    if not is_expression(condition):
        return yes if condition else no
    if _is_float(yes) or _is_float(no):
        return tirx.Select(condition, _as_float(yes), _as_float(no))
    return tirx.Select(condition, dims.expression(yes), dims.expression(no))


def _rounding(plain: Callable[[float], int], function: Callable[[Any], Any]) -> Callable[[Item], Item]:
    def apply(a: Item) -> Item:
        return function(_as_float(a)) if is_expression(a) else float(plain(a))

    return apply


def _negate(a: Item) -> Item:
    return tirx.IntImm("int64", 0) - a if is_expression(a) else -a


def _square_root(a: Item) -> Item:
    return tirx.sqrt(_as_float(a)) if is_expression(a) else math.sqrt(a)


def _reciprocal(a: Item) -> Item:
    return _as_float(1.0) / _as_float(a) if is_expression(a) else 1.0 / a


ELEMENTWISE: dict[str, tuple[Callable[..., Item], str | None]] = {
    "Add": (_arithmetic(lambda a, b: a + b), None),
    "Sub": (_arithmetic(lambda a, b: a - b), None),
    "Mul": (_arithmetic(lambda a, b: a * b), None),
    "Div": (_divide, None),
    "Mod": (_modulo, None),
    "Max": (_larger, None),
    "Min": (_smaller, None),
    "Equal": (_equal, "bool"),
    "Less": (_ordered(lambda a, b: a < b, lambda a, b: a >= b), "bool"),
    "LessOrEqual": (_ordered(lambda a, b: a <= b, lambda a, b: a > b), "bool"),
    "Greater": (_ordered(lambda a, b: a > b, lambda a, b: a <= b), "bool"),
    "GreaterOrEqual": (_ordered(lambda a, b: a >= b, lambda a, b: a < b), "bool"),
    "And": (_logical(tirx.And, lambda a, b: a and b), "bool"),
    "Or": (_logical(tirx.Or, lambda a, b: a or b), "bool"),
    "Not": (lambda a: tirx.Not(a) if is_expression(a) else not a, "bool"),
    "Where": (_choose, None),
    "Neg": (_negate, None),
    "Sqrt": (_square_root, None),
    "Reciprocal": (_reciprocal, None),
    "Floor": (_rounding(math.floor, tirx.floor), None),
    "Ceil": (_rounding(math.ceil, tirx.ceil), None),
    "Identity": (lambda a: a, None),
}


def elementwise(node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """An elementwise operator on known values."""
    function, dtype = ELEMENTWISE[node.op_type]
    arrays = np.broadcast_arrays(*(_objects(operand) for operand in operands))
    flat = [array.reshape(-1) for array in arrays]
    kind = dtype or operands[-1].dtype
    if dtypes.is_integer(kind) and node.op_type in ("Add", "Sub", "Mul", "Div", "Mod", "Neg") and len(operands) < 3:
        items = [_tidy(function(*parts)) for parts in zip(*flat, strict=True)]
    else:
        items = [function(*parts) for parts in zip(*flat, strict=True)]
    return make(items, arrays[0].shape, kind)


def cast(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """Cast of known values; float to integer truncates."""
    if node.op_type == "CastLike":
        dtype = operands[1].dtype
    else:
        dtype = dtypes.tvm_type(ir.DataType(node.attributes.get_int("to", 0)), node.name or "Cast")

    def convert(item: Item) -> Item:
        if is_expression(item):
            if dtypes.is_float(dtype):
                return tirx.Cast("float32", item) if not _is_float(item) else item
            if dtype == "bool":
                return tirx.NE(item, tirx.const(0, item.ty.dtype))
            return tirx.Cast("int64", item) if str(item.ty.dtype) != "int64" else item
        if dtypes.is_float(dtype):
            return float(item)
        return bool(item) if dtype == "bool" else int(item)

    return make([convert(item) for item in operands[0].array.reshape(-1)], operands[0].shape, dtype)


def gather(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """Gather with known indices."""
    data, where = operands
    axis = axis_of(node, node.attributes.get_int("axis", 0), data.array.ndim)
    taken = np.take(_objects(data), where.array.astype(np.int64), axis=axis)
    return make(np.asarray(taken, dtype=object).reshape(-1), np.shape(taken), data.dtype)


def concat(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """Concat of known values."""
    joined = np.concatenate([_objects(operand) for operand in operands], axis=node.attributes.get_int("axis", 0))
    return make(joined.reshape(-1), joined.shape, operands[0].dtype)


def slice_(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """Slice of known values with known numbers."""
    data = operands[0].array
    starts, ends = known_ints(ctx, node, 1, "starts") or [], known_ints(ctx, node, 2, "ends") or []
    if len(node.inputs) < 2:
        starts = list(node.attributes.get_ints("starts", ()))
        ends = list(node.attributes.get_ints("ends", ()))
    axes = known_ints(ctx, node, 3, "axes") or list(node.attributes.get_ints("axes", range(len(starts))))
    steps = known_ints(ctx, node, 4, "steps") or [1] * len(starts)
    index: list[Any] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = data.shape[axis]
        low = max(min(start + size if start < 0 else start, size), 0 if step > 0 else -1)
        high = end + size if end < 0 else end
        high = max(min(high, size), -1 if step < 0 else 0)
        if step < 0:
            low = min(low, size - 1)
        index[axis] = slice(low, None if high < 0 else high, step)
    taken = data[tuple(index)]
    return make(taken.reshape(-1), taken.shape, operands[0].dtype)


def reduce_product(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant:
    """ReduceProd and ReduceSum over all elements of a vector."""
    data = operands[0]
    axes = known_ints(ctx, node, 1, "axes") or list(node.attributes.get_ints("axes", ()))
    if data.array.ndim > 1 or axes not in ([], [0], [-1]):
        raise refuse(node, "only vectors of sizes can be reduced while compiling")
    items = list(data.array.reshape(-1))
    function = ELEMENTWISE["Mul" if node.op_type == "ReduceProd" else "Add"][0]
    total: Item = 1 if node.op_type == "ReduceProd" else 0
    for item in items:
        total = _tidy(function(total, item))
    keep = node.attributes.get_int("keepdims", 1) == 1
    return make([total], (1,) if keep else (), data.dtype)


def range_(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant | None:
    """Range of numbers; None where the count is symbolic, or the result is not small."""
    if any(operand.is_symbolic for operand in operands):
        return None
    start, limit, step = (operand.array.reshape(-1)[0] for operand in operands)
    items = np.arange(start, limit, step).astype(dtypes.numpy_type(operands[0].dtype))
    return Constant(items, operands[0].dtype) if items.size <= LARGEST else None


def constant_of_shape(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant | None:
    """ConstantOfShape where the shape is numbers and small."""
    if operands[0].is_symbolic or int(np.prod(operands[0].array, dtype=np.float64)) > LARGEST:
        return None
    tensor = node.attributes.get_tensor("value")
    shape = tuple(int(item) for item in operands[0].array.reshape(-1))
    if tensor is None:
        return Constant(np.zeros(shape, np.float32), "float32")
    array, dtype = dtypes.from_tensor(tensor, node.name or "ConstantOfShape")
    return Constant(np.full(shape, array.reshape(-1)[0]), dtype)


def rearrange(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> Constant | None:
    """Reshape, Squeeze, Unsqueeze, Flatten, Transpose, Expand and Tile of known values."""
    data = operands[0]
    axes = known_ints(ctx, node, 1, "axes") if present(node, 1) is not None else None
    if node.op_type == "Squeeze":
        axes = axes if axes is not None else list(node.attributes.get_ints("axes", ()))
        array = np.squeeze(data.array, axis=tuple(axes)) if axes else np.squeeze(data.array)
    elif node.op_type == "Unsqueeze":
        axes = axes if axes is not None else list(node.attributes.get_ints("axes", ()))
        array = np.expand_dims(data.array, tuple(axes))
    elif node.op_type == "Transpose":
        array = np.transpose(data.array, node.attributes.get_ints("perm"))
    elif node.op_type == "Tile":
        array = np.tile(data.array, axes or [])
    elif node.op_type == "Expand":
        array = data.array * np.ones(axes or [], dtype=np.int64).astype(object)
    elif node.op_type == "Flatten":
        split = node.attributes.get_int("axis", 1)
        array = data.array.reshape(int(np.prod(data.shape[:split])), -1)
    else:
        wanted = [data.shape[i] if item == 0 else item for i, item in enumerate(axes or [])]
        array = data.array.reshape(wanted)
    if array.size > LARGEST:
        return None
    return make(array.reshape(-1), array.shape, data.dtype)


def split(ctx: Context, node: ir.Node, operands: Sequence[Constant]) -> list[Constant]:
    """Split of a known vector."""
    sizes = known_ints(ctx, node, 1, "split") or list(node.attributes.get_ints("split", ()))
    axis = axis_of(node, node.attributes.get_int("axis", 0), operands[0].array.ndim)
    length = operands[0].shape[axis]
    if not sizes:
        chunk = -(-length // len(node.outputs))
        sizes = [min(chunk, length - chunk * index) for index in range(len(node.outputs))]
    parts = np.split(operands[0].array, np.cumsum(sizes)[:-1], axis=axis)
    return [make(part.reshape(-1), part.shape, operands[0].dtype) for part in parts]


Special = Callable[[Context, ir.Node, Sequence[Constant]], "Constant | list[Constant] | None"]
SPECIAL: dict[str, Special] = {
    "Cast": cast,
    "CastLike": cast,
    "Gather": gather,
    "Concat": concat,
    "Slice": slice_,
    "ReduceProd": reduce_product,
    "ReduceSum": reduce_product,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Split": split,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Tile"), rearrange),
}


OPERATORS = frozenset({*ELEMENTWISE, *SPECIAL})
#: Operators whose further operands only say where and how many: they are worked out here when these are numbers.
_STEERED = frozenset(SPECIAL) - {"Concat", "Cast", "CastLike", "Range"}


def evaluate(ctx: Context, node: ir.Node, operands: Sequence[Any]) -> list[Constant] | None:
    """The outputs of a node whose inputs are all known and small; None when it must run as a kernel."""
    if node.domain or not operands or not all(isinstance(operand, Constant) for operand in operands):
        return None
    if not is_small(operands):
        return None
    if node.op_type in _STEERED and any(operand.is_symbolic for operand in operands[1:]):
        return None
    if node.op_type in ELEMENTWISE:
        return [elementwise(node, operands)]
    special = SPECIAL.get(node.op_type)
    result = None if special is None else special(ctx, node, operands)
    if result is None:
        return None
    return result if isinstance(result, list) else [result]


def is_small(operands: Sequence[Any]) -> bool:
    """Whether operands are known and small enough to be worked on here.

    Floats that do not come from shapes keep the arithmetic of their kernels, unless there are only a few.
    """
    if not all(isinstance(operand, Constant) for operand in operands):
        return False
    if sum(operand.array.size for operand in operands) > LARGEST:
        return False
    return any(operand.is_symbolic for operand in operands) or all(
        operand.dtype in ("int64", "int32", "bool") or operand.array.size <= 8 for operand in operands
    )
