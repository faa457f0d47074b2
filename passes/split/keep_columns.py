"""Keeps the inputs with the largest activations at more bits (proxy quantization: arXiv 2212.09720, section 3.2).

Without data, the standard deviation of the weights that make a hidden unit stands for the size of its outliers. For
the layers i and i + 1 with weights W_i [.., units] and W_(i+1) [units, ..] the kept inputs of layer i + 1 are

    J = the largest share p of units by std(W_i[:, unit])
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.base import PassResult
from kbitc.passes.split import COLUMNS, add_product, matmul_weights, set_weight

#: Operators that keep hidden units apart, so that unit j of their output comes from unit j of an input.
THROUGH = frozenset(
    ("Add", "Sub", "Mul", "Div", "Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu",
     "Elu", "Clip", "Identity", "LayerNormalization", "Min", "Max", "Sqrt", "Softplus")
)  # fmt: skip
#: How far back the layer before is looked for.
MOST_NODES = 64


@dataclass(frozen=True)
class KeepColumns:
    """Before: `MatMul(x, W)` with constant W [C, N], x made by another such product through elementwise operators.

    After: `MatMul(x, W') + MatMul(Gather(x, J, axis=-1), W[J])` with W' = W whose rows J are zero, J the ceil(share C)
    inputs whose units have the largest standard deviation in the layer before.

    Keeps weights that another operator than MatMul reads, and products whose layer before is not found.
    """

    share: float

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        found = [(item, _layer_before(item.nodes[0], item.shape[2])) for item in matmul_weights(model)]
        modified = False
        for candidate, before in found:
            if before is None or len(candidate.nodes) != 1:
                continue
            weight = model.graph.initializers[candidate.tensor]
            array, node = edit.constant(weight), candidate.nodes[0]
            if array is None or node.inputs[0] is None:
                continue
            kept = largest_units(before, self.share)
            rest = np.array(array)
            rest[kept] = 0
            small = edit.add_initializer(model.graph, f"{candidate.tensor}{COLUMNS}", np.ascontiguousarray(array[kept]))
            set_weight(weight, rest)
            index = edit.add_initializer(model.graph, f"{candidate.tensor}_kept_index", kept)
            part = edit.insert_before(node, "Gather", [node.inputs[0], index], axis=-1)
            add_product(node, part, small, "_kept")
            modified = True
        return PassResult(model, modified)


def largest_units(weight: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.int64]:
    """The ceil(share N) columns of a weight [C, N] with the largest standard deviation, ascending."""
    deviation = weight.std(axis=0, dtype=np.float64)
    return np.sort(np.argsort(-deviation, kind="stable")[: ceil(share * len(deviation))]).astype(np.int64)


def _layer_before(node: ir.Node, units: int) -> npt.NDArray[np.float32] | None:
    """The weight [.., units] of the nearest product that makes the units of a node's first input."""
    waiting, seen = [node.inputs[0]], 0
    while waiting and seen < MOST_NODES:
        value = waiting.pop(0)
        producer = None if value is None else value.producer()
        if producer is None or producer.domain != "":
            continue
        seen += 1
        if producer.op_type == "MatMul":
            weight = edit.constant(producer.inputs[1])
            if weight is not None and weight.ndim == 2 and weight.shape[1] == units:
                return np.asarray(weight, np.float32)
        elif producer.op_type in THROUGH:
            waiting += producer.inputs
    return None
