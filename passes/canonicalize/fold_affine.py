"""Takes multiplications and additions of constants behind a convolution into its weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import Array, add_initializer, all_nodes, constant, is_op, only_use, root_graph
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class FoldAffine:
    """Before: `Conv(x, W, b) * s + t` with constants of one element or one a channel. After: `Conv(x, W s, b s + t)`.

    ConvTranspose too. Products are computed in float64 and rounded once.

    Keeps the graph when the convolution's result has other readers or is a graph output, when W or b is computed, when
    the constant varies along another axis than the channels, and when it widens the result.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            while is_op(node, "Conv", "ConvTranspose") and node.graph is not None and _fold_reader(node):
                modified = True
        return PassResult(model, modified)


def _fold_reader(conv: ir.Node) -> bool:
    """Fold the node that reads the convolution, if it can be."""
    output = conv.outputs[0]
    reader = only_use(output)
    weight = constant(conv.inputs[1])
    bias = _bias(conv)
    size = edit.rank(output)
    if reader is None or weight is None or bias is None or size is None or weight.dtype.kind != "f":
        return False
    if reader.graph is not conv.graph or not is_op(reader, "Add", "Sub", "Mul", "Div"):
        return False
    other = reader.inputs[1] if reader.inputs[0] is output else reader.inputs[0]
    if is_op(reader, "Sub", "Div") and reader.inputs[0] is not output:
        return False
    vector = _per_channel(constant(other), size, bias.size)
    if vector is None or (reader.op_type == "Div" and not np.all(vector)):
        return False
    if reader.op_type in ("Mul", "Div"):
        factor = vector if reader.op_type == "Mul" else 1.0 / vector
        _set_weight(conv, (weight.astype(np.float64) * _along_weight(conv, factor, weight.ndim)).astype(weight.dtype))
        _set_bias(conv, (bias * factor).astype(weight.dtype))
    else:
        _set_bias(conv, (bias + (vector if reader.op_type == "Add" else -vector)).astype(weight.dtype))
    edit.replace(reader, output)
    return True


def _bias(conv: ir.Node) -> Array | None:
    """The bias in float64 [C], zeros when there is none; None when it is computed."""
    given = conv.inputs[2] if len(conv.inputs) > 2 else None
    if given is not None:
        array = constant(given)
        return None if array is None else array.astype(np.float64)
    weight = constant(conv.inputs[1])
    if weight is None:
        return None
    channels = weight.shape[0] if conv.op_type == "Conv" else weight.shape[1] * conv.attributes.get_int("group", 1)
    return np.zeros(channels, np.float64)


def _per_channel(array: Array | None, size: int, channels: int) -> Array | None:
    """A constant as one float64 number a channel, or None when it is no such constant."""
    if array is None or array.dtype.kind != "f" or array.ndim > size:
        return None
    shape = (1,) * (size - array.ndim) + array.shape
    if any(dim != 1 for axis, dim in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (channels,))


def _along_weight(conv: ir.Node, factor: Array, ndim: int) -> Array:
    """The factors in a shape that multiplies the weight: [O, 1, ...]; ConvTranspose holds [I, O/g, ...]."""
    if conv.op_type == "Conv":
        return factor.reshape(-1, *([1] * (ndim - 1)))
    weight = constant(conv.inputs[1])
    group = conv.attributes.get_int("group", 1)
    inputs = weight.shape[0] if weight is not None else 1
    rows = np.repeat(factor.reshape(group, -1), inputs // group, axis=0)
    return rows.reshape(*rows.shape, *([1] * (ndim - 2)))


def _set_weight(conv: ir.Node, array: Array) -> None:
    old = conv.inputs[1]
    _replace_constant(conv, 1, array, old.name if old is not None and old.name else "weight")


def _set_bias(conv: ir.Node, array: Array) -> None:
    old = conv.inputs[2] if len(conv.inputs) > 2 else None
    if old is None:
        edit.set_inputs(conv, [conv.inputs[0], conv.inputs[1], None])
        weight = conv.inputs[1]
        name = f"{weight.name if weight is not None else 'weight'}.bias"
        value = add_initializer(root_graph(conv), name, array)
        edit.set_inputs(conv, [conv.inputs[0], conv.inputs[1], value])
        return
    _replace_constant(conv, 2, array, old.name or "bias")


def _replace_constant(conv: ir.Node, index: int, array: Array, name: str) -> None:
    """Give the node a new constant under the old one's name; the old one stays when others read it."""
    old = conv.inputs[index]
    graph = root_graph(conv)
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output() and old.is_initializer():
        old.const_value = ir.Tensor(np.ascontiguousarray(array), name=old.name)
        old.shape, old.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        return
    conv.replace_input_with(index, add_initializer(graph, name, np.ascontiguousarray(array)))
