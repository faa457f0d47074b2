"""Quantize the activation of a planned node at run time.

Before:
    MatMul(x, W), Conv(x, W)
After:
    MatMul(kbitc::DynamicQuantize(x, axis = last, block), W)      Conv: axis = 1, the channels of a pixel
Keeps the graph when the plan says float32. One DynamicQuantize serves every planned user of the same value with
the same axis and block, in the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit, functions, ops


def quantize_activations(model: ir.Model, blocks: Mapping[str, int]) -> list[str]:
    """Insert run-time activation quantization.

    Args:
        model: changed in place.
        blocks: node name -> elements that share an activation scale.

    Returns:
        Names of the kbitc functions that the graph now needs.
    """
    made: dict[tuple[ir.Graph, ir.Value, int, int], ir.Value] = {}
    for node in edit.all_nodes(model):
        if node.name is None or node.name not in blocks:
            continue
        use = ops.WEIGHT_USES[node.op_type]
        source = node.inputs[use.activation_input or 0]
        if source is None or source.shape is None:
            raise InternalError("activation without a shape reached the rewrite", where=f"node {node.name!r}")
        axis = len(source.shape) - 1 if use.kind == "matmul" else 1
        graph = edit.root_graph(node)
        key = (graph, source, axis, blocks[node.name])
        if key not in made:
            made[key] = _insert(graph, node, source, axis, blocks[node.name])
        node.replace_input_with(use.activation_input or 0, made[key])
    return [functions.DYNAMIC_QUANTIZE] if made else []


def _insert(graph: ir.Graph, user: ir.Node, source: ir.Value, axis: int, block: int) -> ir.Value:
    """A DynamicQuantize node in front of its first user."""
    name = f"{source.name}.dynamic_a{axis}_b{block}" if source.graph is graph else f"{user.name}.dynamic_b{block}"
    attributes = {"axis": axis, "after": axis + 1, "block": block}
    node = ir.node(functions.DYNAMIC_QUANTIZE, [source], attributes=attributes, domain=functions.DOMAIN, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, source.shape, source.type
    graph.insert_before(user, node)
    return output
