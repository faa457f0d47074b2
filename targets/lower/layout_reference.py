"""What the channels-last operators of `kbitc.core` mean: the standard operator between two Transposes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, constant, insert_before, root_graph
from kbitc.targets.lower.layout import CORE_DOMAIN, first_from_last, last_from_first


def expand_core(model: ir.Model) -> ir.Model:
    """Replace every `kbitc.core` node by Transpose, the ONNX operator, Transpose: a model that onnxruntime runs.

    `OpNHWC(x, ...)` is `Transpose<0,2,3,1>(Op(Transpose<0,3,1,2>(x), ...))`; the entries of ResizeNHWC's roi, scales
    and sizes are put back into channels-first order.
    """
    for node in list(model.graph):
        if node.domain == CORE_DOMAIN:
            _expand(node)
    model.graph.opset_imports.pop(CORE_DOMAIN, None)
    edit.name_nodes(model)
    return model


def _expand(node: ir.Node) -> None:
    data = node.inputs[0]
    size = edit.rank(data) or 4
    op_type = node.op_type.removesuffix("NHWC")
    name = node.name or op_type
    first = insert_before(node, "Transpose", [data], name=f"{name}.in", perm=first_from_last(size))
    others = list(node.inputs[1:])
    if op_type == "Resize":
        others = [_restored(node, value, size, index) for index, value in enumerate(others)]
    made = insert_before(node, op_type, [first, *others], name=f"{name}.first")
    new = made.producer()
    if new is not None:
        for attribute in node.attributes.values():
            new.attributes.add(attribute)
    output = insert_before(
        node, "Transpose", [made], name=f"{name}.out", like=node.outputs[0], perm=last_from_first(size)
    )
    edit.replace(node, output)


def _restored(node: ir.Node, value: ir.Value | None, size: int, index: int) -> ir.Value | None:
    array = constant(value)
    if value is None or (array is not None and array.size == 0):
        return value
    order = first_from_last(size)
    picked = order if index > 0 else [*order, *[axis + size for axis in order]]
    places = add_initializer(root_graph(node), f"{value.name}.first_order", np.asarray(picked, np.int64))
    return insert_before(node, "Gather", [value, places], axis=0)
