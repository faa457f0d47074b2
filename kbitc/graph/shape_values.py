"""What small integer tensors hold, as far as it follows from shapes: the elements of Shape -> Gather -> Concat chains.

ONNX's own data propagation gives up on Cast, on Slice of unknown ends and on negative steps; Paddle and TensorFlow
exports lean on exactly these. An element is a `Dim`: a number, an expression over the model's symbols, or unknown.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims as d
from kbitc.graph.dims import Dim
from kbitc.graph.edit import Array, constant, integers, rank

#: Longest list of elements that is followed.
MAX_ELEMENTS = 64

Elements = list[Dim]
_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32))


class ShapeValues:
    """Elements of integer tensors of rank 0 and 1, found on demand and kept.

    The walk uses the shapes stored on values when it is asked: make a new object after shapes changed.
    """

    def __init__(self) -> None:
        self._known: dict[ir.Value, Elements | None] = {}

    def elements(self, value: ir.Value | None) -> Elements | None:
        """The elements of `value` (one element for a scalar), or None when nothing is known about them."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None
            self._known[value] = self._find(value)
        return self._known[value]

    def _find(self, value: ir.Value) -> Elements | None:
        array = constant(value)
        if array is not None:
            return _constant_elements(array)
        node = value.producer()
        if node is None or node.domain:
            return None
        rule = _RULES.get(node.op_type)
        if rule is None:
            return None
        found = rule(self, node)
        return found if found is not None and len(found) <= MAX_ELEMENTS else None


def _constant_elements(array: Array) -> Elements | None:
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and array.size <= 8 and bool(np.all(array % 1 == 0)))
    if not whole or array.ndim > 1 or array.size > MAX_ELEMENTS:
        return None
    return [int(item) for item in array.reshape(-1)]


def _shape(values: ShapeValues, node: ir.Node) -> Elements | None:
    found = d.of(node.inputs[0])
    if found is None:
        return None
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(found))
    return found[start:end]


def _size(values: ShapeValues, node: ir.Node) -> Elements | None:
    found = d.of(node.inputs[0])
    return None if found is None else [d.product(found)]


def _same(values: ShapeValues, node: ir.Node) -> Elements | None:
    return values.elements(node.inputs[0])


def _cast(values: ShapeValues, node: ir.Node) -> Elements | None:
    kinds = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return values.elements(node.inputs[0]) if node.attributes.get_int("to", 0) in kinds else None


def _gather(values: ShapeValues, node: ir.Node) -> Elements | None:
    data, index = values.elements(node.inputs[0]), values.elements(node.inputs[1])
    if data is None or index is None or rank(node.inputs[0]) != 1 or not all(isinstance(item, int) for item in index):
        return None
    picked = [item for item in index if isinstance(item, int) and -len(data) <= item < len(data)]
    return [data[item] for item in picked] if len(picked) == len(index) else None


def _slice(values: ShapeValues, node: ir.Node) -> Elements | None:
    data = values.elements(node.inputs[0])
    if data is None or rank(node.inputs[0]) != 1:
        return None
    ends = [values.elements(value) for value in node.inputs[1:]] + [None] * 4
    start, stop, step = ends[0], ends[1], ends[3] or [1]
    if start is None or stop is None or len(start) != 1 or len(stop) != 1:
        return None
    if not (isinstance(start[0], int) and isinstance(stop[0], int) and isinstance(step[0], int) and step[0]):
        return None
    return data[_slice_of(start[0], stop[0], step[0], len(data))]


def _slice_of(start: int, stop: int, step: int, size: int) -> slice:
    if step < 0 and stop < -size:
        return slice(start, None, step)
    return slice(start, stop, step)


def _concat(values: ShapeValues, node: ir.Node) -> Elements | None:
    result: Elements = []
    for value in node.inputs:
        part = values.elements(value)
        if part is None:
            shape = d.of(value)
            if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > MAX_ELEMENTS:
                return None
            part = [None] * shape[0]
        result += part
    return result


def _arithmetic(operation: Callable[[Dim, Dim], Dim]) -> Callable[[ShapeValues, ir.Node], Elements | None]:
    def rule(values: ShapeValues, node: ir.Node) -> Elements | None:
        left, right = values.elements(node.inputs[0]), values.elements(node.inputs[1])
        if left is None or right is None:
            return None
        size = max(len(left), len(right)) if left and right else 0
        if len(left) not in (1, size) or len(right) not in (1, size):
            return None
        return [operation(left[i % len(left)], right[i % len(right)]) for i in range(size)]

    return rule


def _divide(left: Dim, right: Dim) -> Dim:
    """ONNX integer Div truncates; on the non-negative sizes met here that is the floor."""
    if isinstance(left, int) and left < 0 or isinstance(right, int) and right <= 0:
        return None
    return d.floor_divide(left, right)


def _divide_rule(values: ShapeValues, node: ir.Node) -> Elements | None:
    if node.inputs[0] is None or node.inputs[0].dtype not in _INTEGERS:
        return None
    return _arithmetic(_divide)(values, node)


def _reduce_prod(values: ShapeValues, node: ir.Node) -> Elements | None:
    data = values.elements(node.inputs[0])
    return None if data is None or rank(node.inputs[0]) != 1 else [d.product(data)]


def _range(values: ShapeValues, node: ir.Node) -> Elements | None:
    parts = [values.elements(value) for value in node.inputs]
    numbers = [part[0] for part in parts if part is not None and len(part) == 1 and isinstance(part[0], int)]
    if len(numbers) != 3:
        return None
    start, stop, step = (int(number) for number in numbers if isinstance(number, int))
    found = range(start, stop, step) if step else range(0)
    return list(found) if len(found) <= MAX_ELEMENTS else None


def _constant_of_shape(values: ShapeValues, node: ir.Node) -> Elements | None:
    shape = values.elements(node.inputs[0])
    if shape is None or len(shape) > 1:
        return None
    count = shape[0] if shape else 1
    fill = node.attributes.get_tensor("value")
    if not isinstance(count, int) or not 0 <= count <= MAX_ELEMENTS:
        return None
    if fill is None or fill.dtype not in _INTEGERS:
        return None
    return [int(fill.numpy().reshape(-1)[0])] * count


def _where(values: ShapeValues, node: ir.Node) -> Elements | None:
    condition = constant(node.inputs[0])
    left, right = values.elements(node.inputs[1]), values.elements(node.inputs[2])
    if left is None or right is None or len(left) != len(right):
        return None
    if condition is not None and condition.size in (1, len(left)):
        flags = np.broadcast_to(condition.reshape(-1), (len(left),))
        return [a if flag else b for flag, a, b in zip(flags, left, right, strict=True)]
    return [a if d.same(a, b) else None for a, b in zip(left, right, strict=True)]


def _flat_only(values: ShapeValues, node: ir.Node) -> Elements | None:
    """Squeeze, Unsqueeze and Reshape keep the elements; only results of rank 0 and 1 are followed."""
    result = rank(node.outputs[0])
    if result is None and node.op_type == "Unsqueeze" and rank(node.inputs[0]) == 0:
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", ())
        result = len(axes or ())
    if result is not None and result > 1:
        return None
    return values.elements(node.inputs[0])


_RULES: dict[str, Callable[[ShapeValues, ir.Node], Elements | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Add": _arithmetic(d.add),
    "Sub": _arithmetic(d.subtract),
    "Mul": _arithmetic(d.multiply),
    "Div": _divide_rule,
    "ReduceProd": _reduce_prod,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Where": _where,
    "Squeeze": _flat_only,
    "Unsqueeze": _flat_only,
    "Reshape": _flat_only,
}
