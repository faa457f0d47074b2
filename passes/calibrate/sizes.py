"""How large values are for a batch, and how much work nodes are, from the shapes: the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

Feeds = Mapping[str, npt.NDArray[Any]]
#: Dims whose size the shapes do not tell count as this.
_UNKNOWN_DIM = 64
#: Multiply-adds that take about as long as to read, compute and write one element.
_ELEMENT = 8
#: Multiply-adds that take about as long as to start one node.
_START = 1 << 16


def bound_dims(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    """Sizes of the symbolic dims of the graph's inputs in a batch."""
    bound: dict[str, int] = {}
    for value in model.graph.inputs:
        dims = value.shape.dims if value.shape is not None else ()
        for dim, size in zip(dims, feeds[value.name or ""].shape, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                bound[dim.value] = int(size)
    return bound


def elements_of(value: ir.Value, bound: Mapping[str, int]) -> int:
    """Number of elements of a value, about."""
    return prod(_dims(value, bound))


def work_of(node: ir.Node, bound: Mapping[str, int]) -> int:
    """Multiply-adds of a node, or as many as take about the same time."""
    made = sum(elements_of(value, bound) for value in node.outputs)
    return _START + made * _ELEMENT + _products(node, bound, made)


def _products(node: ir.Node, bound: Mapping[str, int], made: int) -> int:
    if node.op_type not in ("MatMul", "Conv", "ConvTranspose") or node.inputs[0] is None or node.inputs[1] is None:
        return 0
    if node.op_type == "MatMul":
        return made * (_dims(node.inputs[0], bound) or [1])[-1]
    terms = prod(_dims(node.inputs[1], bound)[1:])
    return terms * (made if node.op_type == "Conv" else elements_of(node.inputs[0], bound))


def _dims(value: ir.Value, bound: Mapping[str, int]) -> list[int]:
    if value.shape is None:
        return [_UNKNOWN_DIM] * 3
    return [dim if isinstance(dim, int) else _UNKNOWN_DIM for dim in value.shape.evaluate(bound).dims]
