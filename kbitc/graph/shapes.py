"""Types and shapes of every value: ONNX's own inference, completed by our rules where it gives up."""

from __future__ import annotations

import re

import onnx
import onnx.shape_inference
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import dims as d
from kbitc.graph.edit import all_nodes
from kbitc.graph.evaluate import first_line
from kbitc.graph.shape_rules import output_dims
from kbitc.graph.shape_values import ShapeValues

#: Initializers of at most this many bytes stay in the message: shapes are computed from them.
_INLINE_BYTES = 1024
_MAX_ROUNDS = 8
#: How ONNX's inference calls the symbols it makes up.
_ONNX_SYMBOL = re.compile(r"unk__\d+")


def infer_shapes(model: ir.Model, *, strict: bool = False) -> None:
    """Store type and shape on every value of the model.

    Two steps take turns until nothing changes: ONNX's inference with data propagation, and our own rules for what it
    leaves open. A dim that stays unknown gets a symbol of its own, `VALUE_dim_2`.

    Args:
        model: changed in place.
        strict: raise when ONNX finds a contradiction instead of leaving the value alone.

    Raises:
        ModelError: in strict mode, with ONNX's own words.
    """
    for round_ in range(_MAX_ROUNDS):
        _standard(model, strict=strict and round_ == 0)
        if not _complete(model):
            break
    _name_unknown_dims(model)


def checkable_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a message in which large initializers are inputs: small enough for ONNX's C++ functions."""
    graph = model.graph
    heavy = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _INLINE_BYTES and not value.is_graph_input()
    }
    outputs = (value for node in all_nodes(model) for value in node.outputs)
    untyped = {value: value.shape for value in outputs if value.type is None and value.shape is not None}
    for name in heavy:
        graph.initializers.pop(name)
    for value in untyped:
        value.shape = None  # a message has no shape without a type, and onnx-ir would say so each time
    try:
        proto = ir.to_proto(model)
    finally:
        for name, value in heavy.items():
            graph.initializers[name] = value
        for value, shape in untyped.items():
            value.shape = shape
    for name, value in heavy.items():
        proto.graph.input.append(ir.to_proto(value))
        proto.graph.input[-1].name = name
    return proto


def _standard(model: ir.Model, *, strict: bool) -> None:
    """ONNX's inference; what it finds is stored on values."""
    proto = checkable_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=strict, strict_mode=strict, data_prop=True)
    except Exception as error:
        if strict:
            raise ModelError("shapes or types contradict each other", got=first_line(error, 400)) from error
        return
    own = {symbol for value in model.graph.inputs if value.shape is not None for symbol in value.shape.free_symbols()}
    for graph, found in zip(model.graphs(), ir.from_proto(inferred).graphs(), strict=True):
        _store(graph, ir.convenience.create_value_mapping(found), own)


def _store(graph: ir.Graph, found: dict[str, ir.Value], own: set[str]) -> None:
    """Keep what ONNX found, except for the symbols it made up: ours follow from the model's inputs."""
    for name, value in ir.convenience.create_value_mapping(graph).items():
        other = found.get(name)
        if other is None or value.is_graph_input() or value.is_initializer():
            continue
        if other.type is not None:
            value.type = other.type
        shape = d.of(other)
        if shape is not None:
            merge(value, [None if _made_up(dim, own) else dim for dim in shape])


def _made_up(dim: d.Dim, own: set[str]) -> bool:
    if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
        return False
    return dim.value not in own and _ONNX_SYMBOL.fullmatch(dim.value) is not None


def _complete(model: ir.Model) -> bool:
    """One walk with our own rules. True when a rank became known that was not: ONNX's inference gets another turn."""
    values = ShapeValues()
    new_rank = False
    for node in all_nodes(model):
        if not node.outputs:
            continue
        output = node.outputs[0]
        known = d.of(output)
        if known is not None and all(isinstance(dim, int) for dim in known):
            continue
        found = output_dims(node, values)
        if found is None or (known is not None and len(known) != len(found)):
            continue
        merge(output, found)
        new_rank = new_rank or known is None
    return new_rank


def merge(value: ir.Value, dims: list[d.Dim]) -> None:
    """Store dims on a value: numbers win over expressions, expressions over what was there, anything over unknown."""
    old = d.of(value)
    if old is None or len(old) != len(dims):
        value.shape = ir.Shape([_unknown() if dim is None else dim for dim in dims])
        return
    merged: list[int | ir.SymbolicDim] = []
    for before, now in zip(old, dims, strict=True):
        if isinstance(before, int):
            merged.append(before)
        elif now is not None:
            merged.append(now)
        else:
            merged.append(_unknown() if before is None else before)
    value.shape = ir.Shape(merged)


def _unknown() -> ir.SymbolicDim:
    return ir.SymbolicDim(None)


def _name_unknown_dims(model: ir.Model) -> None:
    """Give each unknown dim a symbol, in node order; elementwise results share the symbol of what they copy."""
    values = ShapeValues()
    counter = 0
    for node in all_nodes(model):
        for position, output in enumerate(node.outputs):
            known = d.of(output)
            if known is None or all(dim is not None for dim in known):
                continue
            found = output_dims(node, values) if position == 0 else None
            if found is not None and len(found) == len(known):
                merge(output, found)
            fixed: list[int | ir.SymbolicDim] = []
            for dim in d.of(output) or []:
                if dim is None:
                    fixed.append(ir.SymbolicDim(f"dim_{counter}"))
                    counter += 1
                else:
                    fixed.append(dim)
            output.shape = ir.Shape(fixed)
