"""Replaces an If on a run-time condition by both branches and a choice of their results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims, edit
from kbitc.graph.edit import all_nodes, constant, is_op, root_graph
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.inline_constant_if import move_branch

#: With indices or divisors that are computed, these fail, or read where they must not, on data they were not made for.
_RISKY = frozenset("Gather GatherElements GatherND ScatterElements ScatterND Div Mod OneHot Range".split())
_RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial".split())


@dataclass(frozen=True)
class IfToWhere:
    """Before: `y = If(c)` with two graphs. After: the nodes of both, then `y = Where(c, y of then, y of else)`.

    Both branches are computed at every run. Their weights are then weights like all others. An If whose condition is
    known is better served by InlineConstantIf.

    Keeps the If when results of the two branches have other types or shapes, or shapes that cannot be told; when a
    branch holds a graph inside, draws random numbers, or an operator that fails on data it was not made for.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "If") and node.graph is not None and constant(node.inputs[0]) is None and _is_safe(node):
                _select(node)
                modified = True
        return PassResult(model, modified)


def _is_safe(node: ir.Node) -> bool:
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for left, right in zip(branches[0].outputs, branches[1].outputs, strict=True):
        a, b = dims.of(left), dims.of(right)
        if left.dtype is None or left.dtype != right.dtype or a is None or b is None or len(a) != len(b):
            return False
        if any(x is None or y is None or not dims.same(x, y) for x, y in zip(a, b, strict=True)):
            return False
    return all(_cannot_fail(child) for branch in branches for child in branch)


def _cannot_fail(node: ir.Node) -> bool:
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return False
    if node.domain or node.op_type in _RANDOM or any(dims.of(value) is None for value in node.outputs if value.name):
        return False
    floats = node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point()
    if node.op_type not in _RISKY or (floats and node.op_type in ("Div", "Mod")):
        return True
    return all(constant(value) is not None for value in node.inputs[1:])


def _select(node: ir.Node) -> None:
    condition = node.inputs[0]
    if edit.rank(condition) != 0:
        empty = edit.add_initializer(root_graph(node), f"{node.outputs[0].name}.scalar", np.zeros(0, np.int64))
        condition = edit.insert_before(node, "Reshape", [condition, empty])
    then, other = (move_branch(node, name) for name in ("then_branch", "else_branch"))
    for output, left, right in zip(node.outputs, then, other, strict=True):
        edit.redirect(output, edit.insert_before(node, "Where", [condition, left, right], name=output.name, like=left))
    edit.remove(node)
