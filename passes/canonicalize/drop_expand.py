"""Elementwise operators broadcast by themselves: an Expand in front of one is often idle."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import dims as d
from kbitc.graph.edit import all_nodes, is_op
from kbitc.graph.shape_rules import BROADCAST
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class DropExpand:
    """Before: `Mul(x, Expand(w, shape))`. After: `Mul(x, w)`.

    Keeps the Expand when the other inputs alone do not have the dims of the result: then it is what widens it.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if not node.domain and node.op_type in BROADCAST and len(node.inputs) > 1:
                modified = _bypass(node) or modified
        return PassResult(model, modified)


def _bypass(node: ir.Node) -> bool:
    modified = False
    for index, value in enumerate(node.inputs):
        expand = value.producer() if value is not None else None
        if expand is None or not is_op(expand, "Expand") or expand.inputs[0] is None:
            continue
        shapes = [d.of(expand.inputs[0] if i == index else other) for i, other in enumerate(node.inputs)]
        target = d.of(node.outputs[0])
        known = [shape for shape in shapes if shape is not None]
        if target is None or len(known) != len(shapes):
            continue
        result = d.broadcast(known)
        if len(result) == len(target) and all(d.same(a, b) for a, b in zip(result, target, strict=True)):
            node.replace_input_with(index, expand.inputs[0])
            modified = True
    return modified
