"""Powers with small constant exponents are products and roots."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import all_nodes, insert_before, is_op, scalar
from kbitc.passes.base import PassResult

_FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


@dataclass(frozen=True)
class PowToMul:
    """Before: `x ** c`. After: c = 2: x x; c = 3: (x x) x; c = 0.5: sqrt(x); c = -1: 1 / x; c = -0.5: 1 / sqrt(x).

    Keeps every other exponent, exponents that are computed, an exponent that widens x by broadcasting, and roots and
    reciprocals of integers.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "Pow"):
                modified = _rewrite(node) or modified
        return PassResult(model, modified)


def _rewrite(node: ir.Node) -> bool:
    base, exponent = node.inputs[0], scalar(node.inputs[1])
    if base is None or exponent is None or (edit.rank(node.inputs[1]) or 0) > (edit.rank(base) or 0):
        return False
    like = node.outputs[0]
    if exponent == 2.0:
        edit.replace_with(node, "Mul", [base, base])
    elif exponent == 3.0:
        squared = insert_before(node, "Mul", [base, base], like=like)
        edit.replace_with(node, "Mul", [squared, base])
    elif base.dtype not in _FLOATS:
        return False
    elif exponent == 0.5:
        edit.replace_with(node, "Sqrt", [base])
    elif exponent == -1.0:
        edit.replace_with(node, "Reciprocal", [base])
    elif exponent == -0.5:
        root = insert_before(node, "Sqrt", [base], like=like)
        edit.replace_with(node, "Reciprocal", [root])
    else:
        return False
    return True
