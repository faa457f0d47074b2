"""Replaces a Loop that runs a given number of times by a Scan over the numbers of its turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims, edit
from kbitc.graph.edit import all_nodes, constant, is_op, root_graph
from kbitc.passes.base import PassResult

_ITERATION, _CONDITION, _STATES = range(3)


@dataclass(frozen=True)
class LoopToScan:
    """Before: `states, results = Loop(count, true, states)` whose body never asks to stop.
    After: `states, results = Scan(states, Range(0, count, 1))` with the same body.

    Keeps a Loop that may stop early, has no count or one below 1, or whose states change their shapes on the way.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if not is_op(node, "Loop") or node.graph is None or not _is_counted(node):
                continue
            if _tell_shapes(node):  # what the body makes of them is known at the next turn
                modified = True
            elif _keeps_shapes(node):
                _scan(node)
                modified = True
        return PassResult(model, modified)


def _is_counted(node: ir.Node) -> bool:
    """Whether it turns as often as its first input says."""
    body, count = node.attributes["body"].as_graph(), constant(node.inputs[0])
    if count is not None and not np.all(count > 0):
        return False
    begins = node.inputs[_CONDITION] is None or _is_true(node.inputs[_CONDITION])
    value: ir.Value | None = body.outputs[0]
    while value is not None and (maker := value.producer()) is not None and is_op(maker, "Identity"):
        value = maker.inputs[0]
    return node.inputs[0] is not None and begins and (value is body.inputs[_CONDITION] or _is_true(value))


def _is_true(value: ir.Value | None) -> bool:
    known = constant(value)
    return known is not None and bool(np.all(known))


def _states(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value, ir.Value]]:
    """Of every state: what it begins with, what the body reads, what it makes."""
    body = node.attributes["body"].as_graph()
    return list(zip(node.inputs[_STATES:], body.inputs[_STATES:], body.outputs[1:], strict=False))


def _tell_shapes(node: ir.Node) -> bool:
    """Give the body the shapes that its states begin with; whether that is new to it."""
    told = False
    for given, read, _ in _states(node):
        if given is not None and given.shape is not None and dims.of(given) != dims.of(read):
            read.shape, told = given.shape, True
    return told


def _keeps_shapes(node: ir.Node) -> bool:
    """Whether every state has a shape, and none is known to leave it."""
    for given, read, made in _states(node):
        before, after = dims.of(given), dims.of(made)
        if given is None or before is None or given.dtype != read.dtype:
            return False
        if after is None:
            continue
        if len(before) != len(after) or any(b is not None and a != b for a, b in zip(before, after, strict=True)):
            return False
    return True


def _scan(node: ir.Node) -> None:
    body, name = node.attributes["body"].as_graph(), node.name or node.outputs[0].name or ""
    turn, going, *states = body.inputs
    if going.uses() or going.is_graph_output():
        always = edit.add_initializer(body, f"{name}.true", np.array(True))
        going.replace_all_uses_with(always)
    body.inputs[:] = [*states, turn]
    body.outputs[:] = body.outputs[1:]
    ends = [edit.add_initializer(root_graph(node), f"{name}.{end}", np.array(end, np.int64)) for end in (0, 1)]
    count = node.inputs[0]
    if edit.rank(count) != 0:
        flat = edit.add_initializer(root_graph(node), f"{name}.scalar", np.zeros(0, np.int64))
        count = edit.insert_before(node, "Reshape", [count, flat], name=f"{name}.count")
    turns = edit.insert_before(node, "Range", [ends[0], count, ends[1]], name=f"{name}.turns")
    node.op_type = "Scan"
    edit.set_inputs(node, [*node.inputs[_STATES:], turns])
    edit.set_attribute(node, "num_scan_inputs", 1)
