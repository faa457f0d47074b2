"""Replaces an If whose condition is known by the branch it takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import all_nodes, constant, is_op, root_graph
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class InlineConstantIf:
    """Before: `If(true)` with two graphs. After: the nodes of the branch that is taken, in the If's place.

    Keeps the If when its condition depends on an input.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if not is_op(node, "If") or node.graph is None or not node.inputs:  # in a branch that was dropped
                continue
            condition = constant(node.inputs[0])
            if condition is not None and condition.size == 1:
                names = (
                    ("then_branch", "else_branch") if bool(condition.reshape(-1)[0]) else ("else_branch", "then_branch")
                )
                _inline(node, *names)
                modified = True
        return PassResult(model, modified)


def _inline(node: ir.Node, taken: str, other: str) -> None:
    results = move_branch(node, taken)
    for output, result in zip(node.outputs, results, strict=True):
        if output.shape is not None and result.shape is None:
            result.shape = output.shape
        edit.redirect(output, result)
    for child in node.attributes[other].as_graph().all_nodes():
        edit.set_inputs(child, ())  # else what only this branch reads would count as read
    edit.remove(node)


def move_branch(node: ir.Node, branch_name: str) -> list[ir.Value]:
    """Move the nodes and initializers of one branch of an If in front of it; the values that were its results."""
    outer = root_graph(node)
    branch = node.attributes[branch_name].as_graph()
    results = list(branch.outputs)
    for name, value in list(branch.initializers.items()):
        if value.const_value is not None:
            new = edit.add_tensor(outer, name, value.const_value)
            results = [new if result is value else result for result in results]
            for user, index in tuple(value.uses()):
                user.replace_input_with(index, new)
    body = list(branch)
    branch.outputs.clear()
    branch.remove(body)
    taken = edit.used_names(outer)
    for child in body:
        child.name = f"{node.name or node.outputs[0].name}.{branch_name[:4]}.{child.name or child.outputs[0].name}"
        for value in child.outputs:
            if value.name and value.name in taken:
                value.name = edit.fresh_name(outer, f"{node.outputs[0].name}.{value.name}")
            if value.name:
                taken.add(value.name)
    outer.insert_before(node, body)
    return results
