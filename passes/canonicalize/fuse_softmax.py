"""Recognises Softmax that an exporter took apart."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import producer
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.match import fuse_each, reduced


@dataclass(frozen=True)
class FuseSoftmax:
    """Before: e = exp(x - ReduceMax(x)); e / ReduceSum(e), both over one axis. After: `Softmax<axis>(x)`.

    Keeps the graph when the two reductions run over different axes or over several, and when e has other readers.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        return fuse_each(model, _fuse, "Div")


def _fuse(node: ir.Node) -> bool:
    power = producer(node.inputs[0], "Exp")
    total = reduced(node.inputs[1], "ReduceSum")
    if power is None or total is None or total[0] is not power.outputs[0] or len(total[1]) != 1:
        return False
    if len(power.outputs[0].uses()) != 2 or power.outputs[0].is_graph_output():
        return False
    difference = producer(power.inputs[0], "Sub")
    if difference is None:
        return False
    largest = reduced(difference.inputs[1], "ReduceMax")
    if largest is None or largest[0] is not difference.inputs[0] or largest[1] != total[1]:
        return False
    edit.replace_with(node, "Softmax", [difference.inputs[0]], axis=total[1][0])
    return True
