"""Import, stage 1: an untrusted ONNX file becomes a checked model with a type and a shape on every value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph.evaluate import first_line
from kbitc.graph.shapes import infer_shapes
from kbitc.importer.external import ExternalFiles
from kbitc.importer.files import parse_model, read_model_file
from kbitc.importer.schema import UNDECLARED, check_nodes
from kbitc.importer.signature import (
    Shapes,
    bind_constants,
    bind_shapes,
    check_signature,
    forget_negative_dims,
    give_ranks,
)
from kbitc.importer.structure import (
    check_functions,
    check_names,
    check_versions,
    hoist_constants,
    nodes_below,
    state_defaults,
)
from kbitc.importer.tensors import DetachedTensor, take_tensors
from kbitc.importer.text import check_text
from kbitc.importer.values import check_values

_TOKEN = "kbitc:"


def load_model(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    shapes: Shapes | None = None,
    constants: Mapping[str, float] | None = None,
) -> ir.Model:
    """Load an ONNX model and check everything that later stages rely on.

    Weights are not copied where they lie in external files: those are mapped.

    Args:
        model: path of a `.onnx` file, or a message (which is not changed).
        shapes: dims to bind, by input name: numbers, names of symbols, or None for "as in the model".
        constants: inputs to make constants, by name: the number that each of their elements is.

    Returns:
        The model in its own opset. Initializers are constants even where the file lists them as inputs too; Constant
        nodes of the main graph are initializers; nodes are sorted; each value has a type and, where it can be known, a
        shape whose unknown dims are named symbols.

    Raises:
        ModelError: the file is missing, damaged, or breaks ONNX's rules.
        UnsupportedError: a version, type or operator that cannot be compiled.
        UsageError: `shapes` or `constants` do not fit the model.
    """
    if isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        files = ExternalFiles(None)
    else:
        path = Path(model)
        proto = parse_model(read_model_file(path), str(path))
        files = ExternalFiles(path.parent)
    taken = check_proto(proto, files, shapes or {}, constants or {})
    result = ir.from_proto(proto)
    _attach(result, taken)
    _drop_constant_inputs(result)
    infer_shapes(result)
    check_values(result)
    return result


def check_proto(
    proto: onnx.ModelProto, files: ExternalFiles, shapes: Shapes, constants: Mapping[str, float]
) -> dict[str, DetachedTensor]:
    """Check a message from the outside in, each check safe on what the ones before let through.

    Returns:
        The tensors that were taken out of the message.
    """
    check_text(proto)
    check_versions(proto)
    hoist_constants(proto.graph)
    check_functions(proto)
    check_names(proto)
    bind_constants(proto.graph, constants)
    taken = take_tensors(proto, files)
    check_signature(proto.graph, shapes)
    forget_negative_dims(proto.graph)
    give_ranks(proto.graph, shapes)
    check_nodes(proto)
    state_defaults(proto)
    _run_checker(proto, taken)
    bind_shapes(proto.graph, shapes)
    return taken


def _run_checker(proto: onnx.ModelProto, taken: dict[str, DetachedTensor]) -> None:
    """ONNX's own checker with full shape inference, on a copy whose large initializers are inputs."""
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    light.ir_version = max(light.ir_version, 4)
    kept = [tensor for tensor in proto.graph.initializer if not _token(tensor)]
    inputs = {item.name for item in light.graph.input}
    for tensor in proto.graph.initializer:
        token = _token(tensor)
        if token and tensor.name not in inputs:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    saved = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del light.graph.initializer[:]
    light.graph.initializer.extend(saved)
    _declare(light)
    _complete_outputs(light)
    try:
        onnx.checker.check_model(light, full_check=True)
    except Exception as error:
        raise ModelError("the model breaks ONNX's rules", got=_checker_words(error)) from error


def _declare(light: onnx.ModelProto) -> None:
    """Give the operator that onnxruntime's optimizer writes without a domain the domain of such operators."""
    undeclared = [node for node in nodes_below(light.graph.node, 0) if not node.domain and node.op_type == UNDECLARED]
    for node in undeclared:
        node.domain = "com.microsoft"
    if undeclared and all(entry.domain != "com.microsoft" for entry in light.opset_import):
        light.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _complete_outputs(light: onnx.ModelProto) -> None:
    """The checker wants a shape on every output, which files need not state: infer it, or take the output away."""
    if all(item.type.tensor_type.HasField("shape") for item in light.graph.output):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
        light.graph.CopyFrom(inferred.graph)
    except Exception as error:
        raise ModelError("the model breaks ONNX's rules", got=_checker_words(error)) from error
    known = [item for item in light.graph.output if item.type.tensor_type.HasField("shape")]
    copies = [onnx.ValueInfoProto.FromString(item.SerializeToString()) for item in known]
    del light.graph.output[:]
    light.graph.output.extend(copies)


def _checker_words(error: Exception) -> str:
    """The useful part of the checker's message: its first sentence and the node it names."""
    text = str(error)
    context = text.find("==> Context:")
    if context >= 0:
        text = f"{text[:context].strip()} {text[context + 4 :].strip()}"
    return first_line(ValueError(text), 400)


def _token(tensor: onnx.TensorProto) -> str | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL or not tensor.external_data:
        return None
    location = tensor.external_data[0].value
    return location if location.startswith(_TOKEN) else None


def _attach(model: ir.Model, taken: dict[str, DetachedTensor]) -> None:
    """Give the initializers whose bytes were taken out of the message their bytes back."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = taken[str(tensor.location)].tensor()


def _drop_constant_inputs(model: ir.Model) -> None:
    """IR version 3 lists initializers among the inputs; kbitc takes them as constants."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in graph.initializers]:
        graph.inputs.remove(value)
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
