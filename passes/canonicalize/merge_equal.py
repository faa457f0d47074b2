"""Keeps one of several equal weights, and one of several nodes that compute the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import is_op
from kbitc.passes.base import PassResult

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class MergeEqual:
    """Before: two initializers with equal bytes; `a = f(x)` and `b = f(x)`. After: one of them, read by all.

    So a tied weight that the file holds twice is quantized once.

    Keeps random operators, nodes with graphs inside, initializers that are graph outputs, and the second of two equal
    nodes when both are graph outputs.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = _merge_initializers(model.graph)
        for graph in model.graphs():
            modified = _merge_nodes(graph) or modified
        return PassResult(model, modified)


def _merge_initializers(graph: ir.Graph) -> bool:
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_output() and tensor.dtype != ir.DataType.STRING:
            alike[(tensor.dtype, tuple(tensor.shape.numpy()))].append(value)
    modified = False
    for group in alike.values():
        if len(group) < 2:
            continue
        kept: dict[bytes, ir.Value] = {}
        for value in group:
            if value.const_value is None or value.name is None:
                continue
            first = kept.setdefault(edit.digest(value.const_value), value)
            if first is not value:
                value.replace_all_uses_with(first)
                del graph.initializers[value.name]
                modified = True
    return modified


def _merge_nodes(graph: ir.Graph) -> bool:
    seen: dict[Hashable, ir.Node] = {}
    modified = False
    for node in list(graph):
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            edit.redirect(old, new)
        edit.remove(node)
        modified = True
    return modified


def _key(node: ir.Node) -> Hashable | None:
    if is_op(node, *_RANDOM):
        return None
    attributes = []
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            return None
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            value = (tensor.dtype, tuple(tensor.shape.numpy()), edit.digest(tensor))
        attributes.append((name, tuple(value) if isinstance(value, list) else value))
    inputs = tuple(id(value) if value is not None else None for value in node.inputs)
    outputs = tuple(bool(value.name) for value in node.outputs)
    return (node.domain, node.op_type, node.overload, inputs, tuple(attributes), outputs)
