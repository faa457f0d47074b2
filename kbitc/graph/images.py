"""Elementwise functions of one value: whole chains and their meeting points (x * sigmoid(x)) seen as one function.

An *image* of x is a value of which every element is a function of the element of x in the same place, computed by
elementwise nodes from x and scalar constants. On codes of 8 bits such a function is a table of 256 entries.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.evaluate import run_node
from kbitc.quant.static import Codes

FloatArray = npt.NDArray[np.float32]
#: Functions that map a bounded range to a bounded range without steep places: fit for tables of 256 entries.
FUNCTIONS = frozenset(
    "Relu LeakyRelu PRelu ThresholdedRelu Clip Sigmoid Tanh HardSigmoid HardSwish Swish Gelu Erf Elu Selu Celu "
    "Softplus Softsign Mish Neg Abs Identity".split()
)
#: Operators of two operands that are a function of one value when the other is a scalar or an image of it too.
BINARY = frozenset("Add Sub Mul Div Max Min".split())


def roots(
    graph: ir.Graph, functions: frozenset[str] = FUNCTIONS | BINARY, carried: Container[str] = ()
) -> dict[ir.Value, ir.Value]:
    """Each image -> the value it is a function of, which is no image itself.

    A value whose name is in `carried` has codes whatever it is made of: its functions have it as their root, even
    where it is an image itself, of a value that has none.
    """
    found: dict[ir.Value, ir.Value] = {}

    def base(value: ir.Value) -> ir.Value:
        root = found.get(value, value)
        return value if value.name in carried and root.name not in carried else root

    for node in graph:
        if node.domain or node.op_type not in functions or len(node.outputs) != 1:
            continue
        sources = {base(value) for value in data_inputs(node)}
        if len(sources) != 1 or not _constants_are_scalars(node):
            continue
        root = sources.pop()
        if root.dtype == ir.DataType.FLOAT:
            found[node.outputs[0]] = root
    return found


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that are not constants."""
    return [value for value in node.inputs if value is not None and edit.constant(value) is None]


def _constants_are_scalars(node: ir.Node) -> bool:
    """A constant operand has one element and does not widen the result; no division by the value itself."""
    ranks = [edit.rank(value) or 0 for value in data_inputs(node)]
    if node.op_type == "Div" and edit.constant(node.inputs[1]) is None:
        return False
    for value in node.inputs:
        array = edit.constant(value)
        if array is not None and (array.size != 1 or array.ndim > max(ranks, default=0)):
            return False
    return True


def function_of(
    value: ir.Value, root: ir.Value, opset: int, carried: Mapping[str, Codes] = MappingProxyType({})
) -> Callable[[FloatArray], FloatArray]:
    """The function that makes `value` out of `root`, an image: f32 [n] -> f32 [n], computed by onnxruntime.

    Values on the way that `carried` names are rounded to these codes, `value` too.
    """

    def compute(numbers: FloatArray) -> FloatArray:
        known: dict[ir.Value, FloatArray] = {root: np.asarray(numbers, np.float32)}
        with np.errstate(all="ignore"):
            return _compute(value, known, opset, carried)

    return compute


def _compute(
    value: ir.Value, known: dict[ir.Value, FloatArray], opset: int, carried: Mapping[str, Codes]
) -> FloatArray:
    if value in known:
        return known[value]
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name} is no image")
    arrays: list[npt.NDArray[Any] | None] = []
    for item in node.inputs:
        array = edit.constant(item)
        if item is None:
            arrays.append(None)
        elif array is not None:
            arrays.append(array.reshape(()))
        else:
            arrays.append(_compute(item, known, opset, carried))
    made = np.asarray(run_node(node, arrays, opset)[0], np.float32)
    codes = carried.get(value.name or "")
    known[value] = made if codes is None else codes.rounded(made)
    return known[value]
