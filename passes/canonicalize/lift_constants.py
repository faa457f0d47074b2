"""Turns every constant into an initializer of the main graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import Array, add_initializer, all_nodes, is_op
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class LiftConstants:
    """Before: Constant nodes anywhere, initializers inside If, Loop and Scan bodies. After: main-graph initializers.

    Keeps a Constant that holds strings or a sparse tensor, and a Constant node inside a function.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "Constant"):
                modified = _lift_node(node, model.graph) or modified
        for graph in list(model.graph.subgraphs()):
            if graph is model.graph:
                continue
            for name, value in list(graph.initializers.items()):
                if value.const_value is None or value.is_graph_input():
                    continue
                new = edit.add_tensor(model.graph, name, value.const_value)
                value.replace_all_uses_with(new, replace_graph_outputs=False) if not value.is_graph_output() else None
                if value.is_graph_output():
                    _bridge(graph, value, new)
                del graph.initializers[name]
                modified = True
        return PassResult(model, modified)


def _bridge(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """A subgraph's output must be made inside it: pass the lifted constant through an Identity."""
    node = ir.Node("", "Identity", [new])
    node.outputs[0].name = edit.fresh_name(graph, f"{old.name}.out")
    node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
    graph.append(node)
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = node.outputs[0]
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)


def _lift_node(node: ir.Node, main: ir.Graph) -> bool:
    array = constant_array(node)
    output = node.outputs[0]
    name = output.name or "constant"
    if array is None:
        return False
    if isinstance(array, np.ndarray):
        value = add_initializer(main, f"{name}.value", array)
    else:
        value = edit.add_tensor(main, f"{name}.value", array)
    edit.replace(node, value)
    if not value.is_graph_output() and name not in edit.used_names(main):
        value.name = name
    return True


def constant_array(node: ir.Node) -> Array | ir.TensorProtocol | None:
    """What a Constant node holds, in whichever of its attributes; None for strings and sparse tensors."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            tensor = attribute.as_tensor()
            return None if tensor.dtype == ir.DataType.STRING else tensor
        if name == "value_int":
            return np.asarray(attribute.as_int(), np.int64)
        if name == "value_float":
            return np.asarray(attribute.as_float(), np.float32)
        if name == "value_ints":
            return np.asarray(list(attribute.as_ints()), np.int64)
        if name == "value_floats":
            return np.asarray(list(attribute.as_floats()), np.float32)
    return None
