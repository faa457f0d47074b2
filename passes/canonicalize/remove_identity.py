"""Removes nodes that hand their input on unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims as d
from kbitc.graph import edit
from kbitc.graph.edit import all_nodes, constant, integers, scalar
from kbitc.graph.shape_rules import TO_THE_END
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class RemoveIdentity:
    """Before: `Identity(x)`, `Dropout(x)`, `Cast<T>(x: T)`, `Transpose<0,1,2>(x)`, `x + 0`, `x * 1`, `max(x, -inf)` ...
    After: x.

    Keeps a node that is a graph output fed by an input or a constant (a graph output needs a node that makes it), a
    Dropout whose mask is read or that trains, `x + 0` and `x * 1` when the constant widens x by broadcasting, and
    Reshape, Expand and Slice whose result is not known to have the shape of x.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            rule = None if node.domain or node.graph is None else _RULES.get(node.op_type)
            source = rule(node) if rule is not None else None
            if source is None or _needed(node, source):
                continue
            edit.replace(node, source)
            modified = True
        return PassResult(model, modified)


def _needed(node: ir.Node, source: ir.Value) -> bool:
    output = node.outputs[0]
    maker = source.producer()
    if not output.is_graph_output():
        return False
    return maker is None or source.is_graph_output() or maker.graph is not node.graph


def _identity(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _dropout(node: ir.Node) -> ir.Value | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = constant(training)
    trains = training is not None and (flag is None or bool(flag.any()))
    mask = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    return None if trains or mask else node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    return source if source is not None and source.dtype == node.attributes.get_int("to", -1) else None


def _transpose(node: ir.Node) -> ir.Value | None:
    perm = node.attributes.get_ints("perm")
    return node.inputs[0] if perm is not None and list(perm) == list(range(len(perm))) else None


def _same_shape(node: ir.Node) -> ir.Value | None:
    """The input when the output is known to have its shape. Sound for operators that only move elements in order."""
    before, after = d.of(node.inputs[0]), d.of(node.outputs[0])
    if before is None or after is None or len(before) != len(after):
        return None
    return node.inputs[0] if all(d.same(a, b) for a, b in zip(before, after, strict=True)) else None


def _slice(node: ir.Node) -> ir.Value | None:
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if starts is None or ends is None or any(starts) or (steps is not None and any(step != 1 for step in steps)):
        return None
    if all(end >= TO_THE_END for end in ends):
        return node.inputs[0]
    return _same_shape(node)


def _concat(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _pad(node: ir.Node) -> ir.Value | None:
    pads = integers(node.inputs[1])
    return node.inputs[0] if pads is not None and not any(pads) else None


def _neutral(number: float, *, both_sides: bool) -> Callable[[ir.Node], ir.Value | None]:
    """A rule for `x op c` where every element of c is the neutral element and x is not widened by c."""

    def rule(node: ir.Node) -> ir.Value | None:
        for data, other in ((0, 1), (1, 0))[: 2 if both_sides else 1]:
            array = constant(node.inputs[other])
            source = node.inputs[data]
            size = edit.rank(source)
            if array is None or source is None or size is None or constant(source) is not None:
                continue
            if not np.all(array == number) or np.any(np.signbit(array)):
                continue
            if (array.size == 1 and array.ndim <= size) or (array.ndim <= size and _same_shape_as(source, node)):
                return source
        return None

    return rule


def _same_shape_as(source: ir.Value, node: ir.Node) -> bool:
    before, after = edit.static_shape(source), edit.static_shape(node.outputs[0])
    return before is not None and before == after


def _limit(number: float) -> Callable[[ir.Node], ir.Value | None]:
    """A rule for Max and Min of x and an infinite number that limits nothing."""

    def rule(node: ir.Node) -> ir.Value | None:
        items = [value for value in node.inputs if scalar(value) != number or (edit.rank(value) or 0) > 0]
        return items[0] if len(items) == 1 else None

    return rule


def _power(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if scalar(node.inputs[1]) == 1.0 and (edit.rank(node.inputs[1]) or 0) == 0 else None


_RULES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Flatten": _same_shape,
    "Slice": _slice,
    "Concat": _concat,
    "Pad": _pad,
    "Add": _neutral(0.0, both_sides=True),
    "Sub": _neutral(0.0, both_sides=False),
    "Mul": _neutral(1.0, both_sides=True),
    "Div": _neutral(1.0, both_sides=False),
    "Pow": _power,
    "Max": _limit(-np.inf),
    "Min": _limit(np.inf),
}
