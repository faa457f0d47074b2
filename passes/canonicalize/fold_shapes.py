"""Replaces computations on shapes by constants, as far as dims are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims as d
from kbitc.graph import edit
from kbitc.graph.dims import Dim
from kbitc.graph.edit import add_initializer, all_nodes, constant, is_op, root_graph
from kbitc.graph.shape_values import ShapeValues
from kbitc.passes.base import PassResult

_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32))


@dataclass(frozen=True)
class FoldShapes:
    """Before: Shape -> Slice -> Concat -> Reshape. After: Reshape to a constant such as [0, -1, 256].

    Two rewrites. A small integer tensor whose elements all follow from static dims becomes an initializer. The target
    of a Reshape becomes a constant when each of its elements is a number, equals the input's dim at the same place (0),
    or is the only one left (-1).

    Keeps the target when two elements stay open, when the target holds a -1 and another open element, and when
    `allowzero` is set and an element is 0.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        values = ShapeValues()
        for node in all_nodes(model):
            if is_op(node, "Reshape"):
                modified = _constant_target(node, values) or modified
            elif len(node.outputs) == 1 and not is_op(node, "Identity"):
                modified = _fold(node.outputs[0], values, model.graph) or modified
        return PassResult(model, modified)


def _fold(output: ir.Value, values: ShapeValues, main: ir.Graph) -> bool:
    if output.dtype not in _INTEGERS or output.is_graph_output() or not output.uses():
        return False
    elements = values.elements(output)
    size = edit.rank(output)
    if elements is None or size is None or size > 1 or not all(isinstance(item, int) for item in elements):
        return False
    if size == 0 and len(elements) != 1:
        return False
    kind = np.int64 if output.dtype == ir.DataType.INT64 else np.int32
    array = np.asarray(elements, kind) if size else np.asarray(elements[0], kind)
    node = output.producer()
    if node is None:
        return False
    value = add_initializer(main, f"{output.name}.folded", array)
    edit.replace(node, value)
    return True


def _constant_target(node: ir.Node, values: ShapeValues) -> bool:
    data, target = node.inputs[0], node.inputs[1]
    if constant(target) is not None:
        return False
    elements = values.elements(target)
    if elements is None or (0 in elements and node.attributes.get_int("allowzero", 0) == 1):
        return False
    found = _solve(d.of(data), elements)
    if found is None:
        return False
    name = f"{node.outputs[0].name}.shape"
    node.replace_input_with(1, add_initializer(root_graph(node), name, np.asarray(found, np.int64)))
    edit.set_attribute(node, "allowzero", None)
    return True


def _solve(data: list[Dim] | None, elements: list[Dim]) -> list[int] | None:
    """Numbers for a Reshape's target, or None when more than one element stays open."""
    found: list[int | None] = []
    for position, item in enumerate(elements):
        if isinstance(item, int):
            found.append(item)
        elif data is not None and position < len(data) and d.same(data[position], item):
            found.append(0)
        else:
            found.append(None)
    open_ = [position for position, item in enumerate(found) if item is None]
    if not open_:
        return [item for item in found if item is not None]
    if len(open_) > 1 or -1 in found:
        return None
    return [-1 if item is None else item for item in found]
