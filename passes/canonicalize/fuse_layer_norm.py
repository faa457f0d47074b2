"""Recognises LayerNormalization that an exporter took apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, constant, is_op, producer, root_graph, scalar
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.match import fuse_each, other_input, reduced, sole_reader, square

_FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16))


@dataclass(frozen=True)
class FuseLayerNorm:
    """Before: d = x - ReduceMean(x); d / sqrt(ReduceMean(d d) + eps) * gamma + beta, or d * (1 / sqrt(...)).
    After: `LayerNormalization<axis, epsilon>(x, gamma, beta)`. (Ba, Kiros, Hinton, arXiv 1607.06450, eq. 4.)

    Without gamma and beta the node gets a gamma of ones.

    Keeps the graph when the means run over other axes than the last ones or over different axes, when they drop the
    reduced dims, when eps is computed, when gamma or beta are computed or vary along other axes than the normalised
    ones (then only the part before them is fused), and when a part in the middle is a graph output.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        return fuse_each(model, _fuse, "Div", "Mul")


def _fuse(node: ir.Node) -> bool:
    found = _match(node)
    if found is None:
        return False
    data, axis, epsilon = found
    sizes = data.shape[axis:] if data.shape is not None else ()
    if data.dtype not in _FLOATS or data.dtype is None or not all(isinstance(dim, int) for dim in sizes):
        return False
    shape = tuple(dim for dim in sizes if isinstance(dim, int))
    node, gamma = _factor(node, shape)
    node, beta = _addend(node, shape)
    if gamma is None:
        name = f"{node.outputs[0].name}.ones"
        gamma = add_initializer(root_graph(node), name, np.ones(shape, data.dtype.numpy()))
    edit.replace_with(
        node, "LayerNormalization", [data, gamma, beta], axis=axis - len(data.shape or ()), epsilon=epsilon
    )
    return True


def _match(node: ir.Node) -> tuple[ir.Value, int, float] | None:
    """(x, first normalised axis, epsilon) when `node` makes the normalised value."""
    for centred, spread in _centred_and_spread(node):
        difference = producer(centred, "Sub")
        if difference is None:
            continue
        data = difference.inputs[0]
        mean = reduced(difference.inputs[1], "ReduceMean")
        variance = _variance(spread)
        if data is None or mean is None or variance is None or mean[0] is not data:
            continue
        squared, axes, epsilon = variance
        size = edit.rank(data) or 0
        if square(squared) is not centred or axes != mean[1] or axes != tuple(range(size - len(axes), size)):
            continue
        return data, axes[0], epsilon
    return None


def _centred_and_spread(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Candidates for (x - mean, sqrt(var + eps)) in `a / sqrt` and `a * reciprocal(sqrt)`."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return []
    if is_op(node, "Div"):
        return [(first, second)]
    pairs = []
    for centred, inverse in ((first, second), (second, first)):
        reciprocal = producer(inverse, "Reciprocal")
        quotient = producer(inverse, "Div")
        if reciprocal is not None and reciprocal.inputs[0] is not None:
            pairs.append((centred, reciprocal.inputs[0]))
        elif quotient is not None and scalar(quotient.inputs[0]) == 1.0 and quotient.inputs[1] is not None:
            pairs.append((centred, quotient.inputs[1]))
    return pairs


def _variance(spread: ir.Value) -> tuple[ir.Value, tuple[int, ...], float] | None:
    """(d d, axes, epsilon) of sqrt(ReduceMean(d d) + epsilon)."""
    root = producer(spread, "Sqrt")
    total = producer(root.inputs[0], "Add") if root is not None else None
    if total is None:
        return None
    for value, other in ((total.inputs[0], total.inputs[1]), (total.inputs[1], total.inputs[0])):
        epsilon, mean = scalar(other), reduced(value, "ReduceMean")
        if epsilon is not None and epsilon > 0 and mean is not None:
            return mean[0], mean[1], epsilon
    return None


def _factor(node: ir.Node, shape: tuple[int, ...]) -> tuple[ir.Node, ir.Value | None]:
    return _affine(node, "Mul", shape)


def _addend(node: ir.Node, shape: tuple[int, ...]) -> tuple[ir.Node, ir.Value | None]:
    return _affine(node, "Add", shape)


def _affine(node: ir.Node, op_type: str, shape: tuple[int, ...]) -> tuple[ir.Node, ir.Value | None]:
    """The reader `normalised op parameter` and its parameter, when it is a constant of the normalised shape."""
    reader = sole_reader(node.outputs[0], op_type)
    if reader is None or reader.graph is not node.graph:
        return node, None
    parameter = other_input(reader, node.outputs[0])
    array = constant(parameter)
    if array is None or parameter is None or tuple(array.shape) != shape:
        return node, None
    return reader, parameter
