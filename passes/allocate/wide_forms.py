"""Operators that only an integer-only graph computes on integers: on int32 numbers finer than codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, images
from kbitc.graph.integer_nonlinear import NORM_CHANNELS
from kbitc.graph.integer_reduce import norm2_bits
from kbitc.passes.allocate.families import (
    EXP,
    LENGTH,
    MOVE,
    MUL,
    NONE,
    NORM,
    QUOTIENT,
    ROOT,
    SCALE,
    SHIFT,
    SOFTMAX,
    SUM,
    TABLE,
    WIDE,
    Form,
    declined,
    first,
    reduced_axes,
    reduced_count,
)

_SHIFTS = frozenset(("Relu", "Clip", "Max", "Min", "Add", "Sub"))


def wide_form(node: ir.Node, form: Form, known: Mapping[ir.Value, Form]) -> Form:
    """The form of a node when nothing may stay float.

    Args:
        node: of the main graph.
        form: what it would be elsewhere.
        known: result -> form of the nodes in front of it.
    """
    if node.domain or not node.outputs or node.outputs[0].dtype != ir.DataType.FLOAT:
        return form
    if form.family == NONE:
        table = node.inputs[0] if node.inputs else None
        if edit.is_op(node, "Gather") and table is not None and edit.constant(table) is not None:
            return Form(MOVE, (table,), node.outputs[0])
        maker = _FAMILIES.get(node.op_type)
        return form if maker is None else maker(node)
    if form.family == MUL:
        source = channel_factors(node)
        return form if source is None else Form(SCALE, (source[0],), node.outputs[0])
    if form.family == TABLE and node.op_type in _SHIFTS:
        sources = images.data_inputs(node)
        behind = known.get(sources[0]) if len(sources) == 1 else None
        turned = node.op_type == "Sub" and node.inputs[0] is not sources[0]
        if behind is not None and behind.family in WIDE and not turned:
            return Form(SHIFT, (sources[0],), node.outputs[0])
    return form


def channel_factors(node: ir.Node) -> tuple[ir.Value, npt.NDArray[np.float64]] | None:
    """(x, one positive factor for each element of its last axis, f64 [C]) of a Mul; None for another product."""
    for source, other in (node.inputs, node.inputs[::-1]):
        array = edit.constant(other)
        if source is None or array is None or source.shape is None or not len(source.shape):
            continue
        last = array.ndim > 0 and array.shape[-1] == array.size == source.shape[-1]
        if last and array.ndim <= len(source.shape) and (array > 0).all():
            return source, np.asarray(array.reshape(-1), np.float64)
    return None


def softmax(node: ir.Node) -> Form:
    """Softmax along any axis."""
    return first(node, SOFTMAX)


def norm(node: ir.Node) -> Form:
    """LayerNormalization and RMSNormalization over the last axis."""
    source, size = node.inputs[0], edit.rank(node.inputs[0])
    if source is None or source.shape is None or size is None:
        return declined("the rank of its input is not known")
    channels = source.shape[-1]
    if node.attributes.get_int("axis", -1) % size != size - 1 or not isinstance(channels, int):
        return declined("it normalizes more than the last axis")
    if channels > NORM_CHANNELS or any(edit.constant(value) is None for value in node.inputs[1:]):
        return declined(f"it has over {NORM_CHANNELS} channels, or its gain is not a constant")
    return first(node, NORM)


def _reduced(family: str) -> Callable[[ir.Node], Form]:
    def make(node: ir.Node) -> Form:
        whole = len(node.inputs) < 2 and node.attributes.get_int("noop_with_empty_axes", 0) == 1
        if not reduced_axes(node) or whole:
            return declined("its axes are not constant")
        if edit.rank(node.outputs[0]) == 0:
            return declined("its result is a scalar")
        return first(node, family)

    return make


def _length(node: ir.Node) -> Form:
    count = reduced_count(node)
    if count is None or norm2_bits(count) < 0:
        return declined("the number of elements under its root is not known, or over 2^26")
    return _reduced(LENGTH)(node)


def _quotient(node: ir.Node) -> Form:
    inputs = tuple(value for value in node.inputs if value is not None)
    return Form(QUOTIENT, inputs, node.outputs[0])


_FAMILIES: dict[str, Callable[[ir.Node], Form]] = {
    "Div": _quotient,
    "Exp": lambda node: first(node, EXP),
    "Reciprocal": _quotient,
    "ReduceL2": _length,
    "ReduceSum": _reduced(SUM),
    "Sqrt": lambda node: first(node, ROOT),
}
