"""Replaces operators without a body of ONNX's own, most of them onnxruntime's, by what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir

from kbitc.graph.edit import all_nodes, set_attribute
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.contrib_attention import BODIES as ATTENTION
from kbitc.passes.canonicalize.contrib_quantized import BODIES as QUANTIZED
from kbitc.passes.canonicalize.expand_composite import make_call
from kbitc.passes.canonicalize.standard_bodies import BODIES as STANDARD_BODIES

DOMAIN = "com.microsoft"
BODIES = {
    DOMAIN: {**QUANTIZED, **ATTENTION},
    "": {**STANDARD_BODIES, **{name: QUANTIZED[name] for name in ("QLinearConv", "QLinearMatMul")}},
}


@dataclass(frozen=True)
class ExpandContrib:
    """Before: com.microsoft QLinearAdd, Attention, ...; QLinearConv, DFT, GridSample, ... of the standard.
    After: a call of a model-local function with the operator's meaning as its body; InlineFunctions opens it.

    Keeps forms of them that have no body here, or not before the sizes of their inputs are known: what is left is
    refused later, by name.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            body = BODIES.get(node.domain, {}).get(node.op_type)
            statements = None if body is None else body(node)
            if statements is not None:
                modified = _expand(model, node, statements) or modified
        return PassResult(model, modified)


def _expand(model: ir.Model, node: ir.Node, statements: str) -> bool:
    """Make the node a call of a function with these statements."""
    inputs = ", ".join(f"i{index}" for index in range(len(node.inputs)))
    outputs = ", ".join(f"o{index}" for index in range(len(node.outputs)))
    version = model.opset_imports.get("", 21)
    head = f'<domain: "", opset_import: ["" : {version}]> {node.op_type} ({inputs}) => ({outputs})'
    body = onnx.parser.parse_function(f"{head} {{ {statements} }}")
    for name in list(node.attributes):
        set_attribute(node, name, None)
    return make_call(model, node, body)
