"""Lets every Scan run over the first axis of its inputs and stack its outputs along the first axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import all_nodes, insert_before, is_op, permute
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class ScanAxes:
    """Before: `Scan<scan_input_axes, scan_output_axes>(states, series)`. After: a Scan without them between Transposes.

    Keeps a Scan with a series or an output of unknown rank.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "Scan") and _move_axes(node):
                modified = True
        return PassResult(model, modified)


def _move_axes(node: ir.Node) -> bool:
    """Put the Transposes around a Scan; False when there is nothing to do or a rank is not known."""
    series = node.attributes.get_int("num_scan_inputs", 0)
    states = len(node.inputs) - series
    read = _axes(node, "scan_input_axes", node.inputs[states:])
    made = _axes(node, "scan_output_axes", node.outputs[states:])
    if read is None or made is None or not any(read + made):
        return False
    for place, axis in enumerate(read, states):
        if axis:
            _read_first(node, place, axis)
    for output, axis in zip(node.outputs[states:], made, strict=True):
        if axis:
            _make_first(output, axis)
    edit.set_attribute(node, "scan_input_axes", None)
    edit.set_attribute(node, "scan_output_axes", None)
    return True


def _axes(node: ir.Node, name: str, values: Sequence[ir.Value | None]) -> list[int] | None:
    """The axis of each value, counted from the front; None when one cannot be."""
    axes = node.attributes.get_ints(name, (0,) * len(values))
    ranks = [edit.rank(value) for value in values]
    if len(axes) != len(values) or any(axis and rank is None for axis, rank in zip(axes, ranks, strict=True)):
        return None
    return [axis % (rank or 1) for axis, rank in zip(axes, ranks, strict=True)]


def _read_first(node: ir.Node, place: int, axis: int) -> None:
    value = node.inputs[place]
    order = [axis, *(other for other in range(edit.rank(value) or 0) if other != axis)]
    moved = insert_before(node, "Transpose", [value], like=value, perm=order)
    moved.shape = permute(None if value is None else value.shape, tuple(order))
    node.replace_input_with(place, moved)


def _make_first(output: ir.Value, axis: int) -> None:
    rest = [other for other in range(edit.rank(output) or 0) if other != axis]
    back = [*range(1, axis + 1), 0, *range(axis + 1, len(rest) + 1)]
    shape = output.shape
    edit.append(output, "Transpose", [], f"{output.name}.along", perm=back)
    output.shape = permute(shape, (axis, *rest))
