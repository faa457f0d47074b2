"""Replaces operators that the lowering does not know by ONNX's own definition of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir

from kbitc.graph.edit import all_nodes
from kbitc.graph.legality import LOWERABLE
from kbitc.passes.base import PassResult

_DOMAIN = "kbitc.body"


@dataclass(frozen=True)
class ExpandComposite:
    """Before: an operator such as LpNormalization or GroupNormalization that no emitter exists for.
    After: a call of a model-local function with the body that ONNX's specification gives; InlineFunctions opens it.

    Keeps operators that have an emitter, operators without a body (they are refused later), and those in `keep`.

    Args:
        keep: operators to leave alone although they could be expanded.
    """

    keep: tuple[str, ...] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        version = model.opset_imports.get("", 21)
        modified = False
        for node in all_nodes(model):
            if node.domain or node.op_type in LOWERABLE or node.op_type in self.keep or node.graph is None:
                continue
            body = _body(node, version)
            modified = (body is not None and make_call(model, node, body)) or modified
        return PassResult(model, modified)


def _body(node: ir.Node, version: int) -> onnx.FunctionProto | None:
    """The definition of the operator as a function, or None when ONNX gives none."""
    try:
        # onnx's own annotations leave the functions of a schema out.
        schema: Any = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    proto = ir.to_proto(node)
    _fill_defaults(proto, schema)
    if schema.has_context_dependent_function:
        types = [_type(value) for value in node.inputs]
        data = schema.get_context_dependent_function(proto.SerializeToString(), types)
        function: onnx.FunctionProto | None = onnx.FunctionProto.FromString(data) if data else None
    elif schema.has_function:
        function = onnx.FunctionProto()
        function.CopyFrom(schema.function_body)
    else:
        return None
    if function is None or not function.node:
        return None
    for attribute in proto.attribute:
        if attribute.name not in node.attributes:
            node.attributes.add(ir.from_proto(attribute))
    return function


def _fill_defaults(proto: onnx.NodeProto, schema: Any) -> None:
    """Bodies refer to attributes by name, so the call must state those that have defaults."""
    present = {attribute.name for attribute in proto.attribute}
    for name, attribute in schema.attributes.items():
        if name not in present and attribute.default_value.name:
            proto.attribute.append(attribute.default_value)


def _type(value: ir.Value | None) -> bytes:
    if value is None or value.type is None:
        return bytes(onnx.TypeProto().SerializeToString())
    return bytes(ir.to_proto(value).type.SerializeToString())


def make_call(model: ir.Model, node: ir.Node, body: onnx.FunctionProto) -> bool:
    """Turn the node into a call of a new function with this body. False when the body leaves an output open that
    the node has."""
    made = {name for child in body.node for name in child.output} | set(body.input)
    asked = list(body.output)[: len(node.outputs)]
    if not made.issuperset(asked):
        return False
    del body.output[:]
    body.output.extend(asked)
    count = sum(key[0] == _DOMAIN for key in model.functions)
    body.domain, body.name = _DOMAIN, f"{node.op_type}_{count}"
    function = ir.serde.deserialize_function(body)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[_DOMAIN] = 1
    node.domain, node.op_type = _DOMAIN, body.name
    return True
