"""Computes in float32 whatever float type the file was written in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import edit
from kbitc.graph.edit import all_nodes
from kbitc.passes.base import PassResult

_CONVERTED = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE))
_FLOAT = ir.TensorType(ir.DataType.FLOAT)
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "output_dtype", "softmax_precision")


@dataclass(frozen=True)
class ToFloat32:
    """Before: a model in float16, bfloat16 or float64. After: the same in float32, with a Cast behind each such input
    and in front of each such output, so that the signature stays.

    Kernels then exist once, and weights are quantized from one type. float16 and bfloat16 lose nothing, float64 is
    rounded.

    Keeps a model whose floats are float32.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            ModelError: a float64 constant beyond float32.
        """
        modified = False
        for graph in model.graphs():
            modified = _convert_graph(graph) or modified
        for node in all_nodes(model):
            modified = _convert_attributes(node) or modified
        if not modified:
            return PassResult(model, False)
        _cast_borders(model.graph)
        return PassResult(model, True)


def _convert_graph(graph: ir.Graph) -> bool:
    """Convert initializers; True when these or any value inside the borders has another float type."""
    modified = False
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _CONVERTED or value.is_graph_output():
            continue
        value.const_value = ir.Tensor(_narrow(tensor.numpy(), name), name=name)
        value.type = _FLOAT
        modified = True
    inside = (value for node in graph if not _is_border(node) for value in node.outputs)
    return modified or any(value.dtype in _CONVERTED for value in inside) or any(map(_needs_cast, graph.inputs))


def _is_border(node: ir.Node) -> bool:
    """A Cast from float32 that makes a graph output of another float type."""
    source = node.inputs[0] if node.inputs else None
    return (
        edit.is_op(node, "Cast")
        and node.outputs[0].is_graph_output()
        and not node.outputs[0].uses()
        and source is not None
        and source.dtype == ir.DataType.FLOAT
    )


def _needs_cast(value: ir.Value) -> bool:
    """A graph input of another float type that something but a Cast to float32 reads."""
    if value.dtype not in _CONVERTED:
        return False
    return not all(
        edit.is_op(user, "Cast") and user.attributes.get_int("to", 0) == ir.DataType.FLOAT for user in value.consumers()
    )


def _narrow(array: edit.Array, name: str) -> edit.Array:
    with np.errstate(over="ignore"):
        result = array.astype(np.float32)
    if np.isfinite(array).all() and not np.isfinite(result).all():
        raise ModelError("a float64 constant is beyond float32", where=f"tensor {name}", got=float(np.abs(array).max()))
    return result


def _convert_attributes(node: ir.Node) -> bool:
    """Element types that attributes name, and tensors they hold. Casts at the borders are made later."""
    modified = False
    if _is_border(node):
        return False
    for name in _TYPE_ATTRIBUTES:
        if not node.domain and node.attributes.get_int(name, 0) in _CONVERTED:
            edit.set_attribute(node, name, int(ir.DataType.FLOAT))
            modified = True
    fill = node.attributes.get_tensor("value")
    if fill is not None and fill.dtype in _CONVERTED:
        edit.set_attribute(node, "value", ir.Tensor(_narrow(fill.numpy(), node.name or node.op_type)))
        modified = True
    return modified


def _cast_borders(graph: ir.Graph) -> None:
    """Casts behind inputs and in front of outputs; every value between them becomes float32."""
    wanted = {}
    for position, value in enumerate(graph.outputs):
        maker = value.producer()
        if value.dtype in _CONVERTED and maker is not None and not _is_border(maker):
            wanted[position] = value.dtype
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.dtype in _CONVERTED and not _is_border(node):
                value.type = _FLOAT
    for value in graph.inputs:
        if _needs_cast(value):
            _cast_input(graph, value)
    for position, dtype in wanted.items():
        _cast_output(graph, position, dtype)


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    cast = ir.Node("", "Cast", [value], edit.attributes(to=int(ir.DataType.FLOAT)), name=f"{value.name}.float32")
    output = cast.outputs[0]
    output.name = edit.fresh_name(graph, f"{value.name}.float32")
    output.type, output.shape = _FLOAT, value.shape
    for user, index in tuple(value.uses()):
        if user is not cast:
            user.replace_input_with(index, output)
    first = next(iter(graph), None)
    if first is None:
        graph.append(cast)
    else:
        graph.insert_before(first, cast)


def _cast_output(graph: ir.Graph, position: int, dtype: ir.DataType | None) -> None:
    value = graph.outputs[position]
    name = value.name or "output"
    value.name = edit.fresh_name(graph, f"{name}.float32")
    cast = ir.Node("", "Cast", [value], edit.attributes(to=int(dtype or ir.DataType.FLOAT)), name=f"{name}.cast")
    cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
    cast.outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
    graph.append(cast)
    graph.outputs[position] = cast.outputs[0]
