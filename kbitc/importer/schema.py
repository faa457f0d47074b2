"""Checks each node against ONNX's own description of its operator: exists, inputs, outputs, attributes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnx.defs

from kbitc.errors import ModelError, UnsupportedError
from kbitc.importer.structure import label

#: Operators of other domains that canonicalisation translates to standard ones, or opens.
CONTRIB = frozenset(
    (
        "Attention",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "EmbedLayerNormalization",
        "FusedConv",
        "FusedGemm",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MultiHeadAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "RotaryEmbedding",
        "MatMulNBits",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "BiasGelu",
        "FusedMatMul",
        "LayerNormalization",
        "DequantizeLinear",
        "QuantizeLinear",
    )
)
#: onnxruntime's optimizer writes it without a domain, though the standard has none of this name.
UNDECLARED = "SimplifiedLayerNormalization"
_DEFAULT_DOMAINS = ("", "ai.onnx")
_MAX_SHOWN = 20


def check_nodes(proto: onnx.ModelProto) -> None:
    """Check all nodes of the model, its subgraphs and its functions.

    Raises:
        UnsupportedError: operators that do not exist in the imported version; all of them are named at once.
        ModelError: a wrong number of inputs or outputs, or a missing, unknown or ill-typed attribute.
    """
    functions = {(function.domain, function.name) for function in proto.functions}
    unknown: list[str] = []
    _check_all(proto.graph.node, _versions(proto.opset_import), functions, unknown)
    for function in proto.functions:
        _check_all(function.node, _versions(function.opset_import), functions, unknown)
    if unknown:
        shown = ", ".join(unknown[:_MAX_SHOWN]) + (
            f" and {len(unknown) - _MAX_SHOWN} more" if len(unknown) > _MAX_SHOWN else ""
        )
        raise UnsupportedError("operators that are not known", got=shown, remedy="export with standard ONNX operators")


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in imports}


def _check_all(
    nodes: Iterable[onnx.NodeProto], versions: dict[str, int], functions: set[tuple[str, str]], unknown: list[str]
) -> None:
    for node in nodes:
        domain = "" if node.domain in _DEFAULT_DOMAINS else node.domain
        for attribute in node.attribute:
            _check_text(node, attribute)
            if attribute.HasField("g"):
                _check_all(attribute.g.node, versions, functions, unknown)
            for graph in attribute.graphs:
                _check_all(graph.node, versions, functions, unknown)
        if (node.domain, node.op_type) in functions:
            continue
        if (domain == "com.microsoft" and node.op_type in CONTRIB) or (not domain and node.op_type == UNDECLARED):
            continue
        if domain not in versions:
            raise ModelError(
                "a node's domain is not imported (no opset_import for it)", where=label(node), got=repr(domain)
            )
        schema = _schema(node.op_type, versions[domain], domain)
        if schema is None:
            name = f"{domain}::{node.op_type}" if domain else f"{node.op_type} (opset {versions[domain]})"
            unknown.append(f"{name} at {label(node)}")
            continue
        _check_arity(node, schema)
        _check_attributes(node, schema)


def _check_text(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    """Strings in attributes are UTF-8, as in the rest of the file."""
    for text in (attribute.s, *attribute.strings):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"attribute {attribute.name!r} is not text", where=label(node), got=repr(text[:40])
            ) from error


def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


def _check_arity(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> None:
    count = len(node.input)
    if not schema.min_input <= count <= schema.max_input:
        raise ModelError(
            "a node has the wrong number of inputs",
            where=label(node),
            got=f"{count}, {node.op_type} takes {_range(schema.min_input, schema.max_input)}",
        )
    for formal, name in zip(schema.inputs, node.input, strict=False):
        if not name and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
            raise ModelError("a required input is left out", where=label(node), got=repr(formal.name))
    if not schema.min_output <= len(node.output) <= schema.max_output:
        raise ModelError(
            "a node has the wrong number of outputs",
            where=label(node),
            got=f"{len(node.output)}, {node.op_type} has {_range(schema.min_output, schema.max_output)}",
        )


def _range(low: int, high: int) -> str:
    if high > 1 << 20:
        return f"{low} or more"
    return str(low) if low == high else f"{low} to {high}"


def _check_attributes(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> None:
    present: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in present:
            raise ModelError("an attribute is given twice", where=label(node), got=repr(attribute.name))
        present.add(attribute.name)
        known = schema.attributes.get(attribute.name)
        if known is None:
            raise ModelError(f"{node.op_type} has no such attribute", where=label(node), got=repr(attribute.name))
        if attribute.type and int(attribute.type) != _type_number(known):
            wanted = onnx.AttributeProto.AttributeType.Name(_type_number(known))
            given = onnx.AttributeProto.AttributeType.Name(attribute.type)
            raise ModelError(
                f"attribute {attribute.name!r} has the wrong type", where=label(node), got=f"{given}, must be {wanted}"
            )
    missing = sorted(name for name, known in schema.attributes.items() if known.required and name not in present)
    if missing:
        raise ModelError(f"required attribute {missing[0]!r} is missing", where=label(node))


def _type_number(known: onnx.defs.OpSchema.Attribute) -> int:
    """The attribute's type as AttributeProto numbers it."""
    kind: Any = known.type
    return int(kind.value)
