"""Gemm is a matrix product and an addition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, all_nodes, constant, insert_before, is_op, permute, root_graph
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class GemmToMatMul:
    """Before: `Gemm<alpha, beta, transA, transB>(A, B, C)`. After: `MatMul(A, B) + C`, with a Transpose a set flag.

    alpha goes into B, and beta into C, when they are constants, else they become multiplications. FoldConstants then
    turns the transposed constant into a weight, unless it is tied to another reader.

    Keeps the Gemm when A's element type is not known.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "Gemm") and node.inputs[0] is not None and node.inputs[0].dtype is not None:
                _rewrite(node)
                modified = True
        return PassResult(model, modified)


def _rewrite(node: ir.Node) -> None:
    left = _transposed(node, node.inputs[0], node.attributes.get_int("transA", 0))
    right = _transposed(node, node.inputs[1], node.attributes.get_int("transB", 0))
    addend = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if addend is not None and beta == 0.0:
        addend = None
    if addend is not None and beta != 1.0:
        addend = _times(node, addend, beta)
    if alpha != 1.0:
        right = _times(node, right, alpha)
    if addend is None:
        edit.replace_with(node, "MatMul", [left, right])
        return
    product = insert_before(node, "MatMul", [left, right], like=node.outputs[0], name=node.name)
    edit.replace_with(node, "Add", [product, addend])


def _transposed(node: ir.Node, value: ir.Value | None, flag: int) -> ir.Value | None:
    if not flag or value is None:
        return value
    result = insert_before(node, "Transpose", [value], like=value, name=f"{value.name}.transposed", perm=[1, 0])
    result.shape = permute(value.shape, (1, 0))
    return result


def _times(node: ir.Node, value: ir.Value | None, factor: float) -> ir.Value | None:
    """`value * factor`; FoldConstants computes it when value is constant."""
    if value is None or value.dtype is None:
        return value
    array = np.asarray(factor, value.dtype.numpy())
    number = add_initializer(root_graph(node), f"{node.outputs[0].name}.factor", array)
    if constant(value) is None:
        return insert_before(node, "Mul", [value, number], like=value)
    return insert_before(node, "Mul", [value, number], like=value, name=f"{value.name}.scaled")
