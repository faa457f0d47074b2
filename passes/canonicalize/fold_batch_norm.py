"""BatchNormalization at inference is one multiplication and one addition a channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import edit
from kbitc.graph.edit import Array, add_initializer, all_nodes, constant, describe, insert_before, is_op, root_graph
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class DecomposeBatchNorm:
    """Before: `BatchNormalization(x, gamma, beta, mean, var)`. After: `x * s + t`, both [C, 1, ...]:
    s = gamma / sqrt(var + epsilon), t = beta - mean * s, computed in float64 and rounded once.

    Behind a convolution FoldAffine then takes both into the weight and the bias.

    Keeps the node when a parameter is computed, when the rank of x is not known, and in training mode.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            ModelError: var + epsilon is not positive.
        """
        modified = False
        for node in all_nodes(model):
            if is_op(node, "BatchNormalization") and not node.attributes.get_int("training_mode", 0):
                modified = _decompose(node) or modified
        return PassResult(model, modified)


def _decompose(node: ir.Node) -> bool:
    data = node.inputs[0]
    size = edit.rank(data)
    parameters = [constant(value) for value in node.inputs[1:5]]
    if size is None or data is None or any(array is None for array in parameters):
        return False
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters if array is not None)
    spread = variance + node.attributes.get_float("epsilon", 1e-5)
    if not np.all(spread > 0):
        raise ModelError("a BatchNormalization variance is negative", where=describe(node), got=float(variance.min()))
    scale = gamma / np.sqrt(spread)
    kind = data.dtype.numpy() if data.dtype is not None else np.dtype(np.float32)
    shape = (-1, *([1] * (size - 2))) if size > 1 else (-1,)
    shift = beta - mean * scale
    name = node.outputs[0].name
    graph = root_graph(node)
    factor = add_initializer(graph, f"{name}.scale", _column(scale, shape, kind))
    offset = add_initializer(graph, f"{name}.shift", _column(shift, shape, kind))
    product = insert_before(node, "Mul", [data, factor], like=node.outputs[0])
    edit.replace_with(node, "Add", [product, offset])
    return True


def _column(numbers: Array, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    return numbers.astype(kind).reshape(shape)
