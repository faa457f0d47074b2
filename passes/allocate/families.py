"""How a node could run on integers: the families, and what every question about a form needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from kbitc.graph import edit

CONTRACTION, PRODUCT, BIAS = "contraction", "product", "bias"
ADD, MUL, CONCAT, MOVE, PEAK = "add", "mul", "concat", "move", "peak"
PRELU = "prelu"
MEAN, AVERAGE, TABLE, NONE = "mean", "average", "table", "none"
SOFTMAX, NORM = "softmax", "norm"
SUM, LENGTH, ROOT, QUOTIENT, SHIFT, EXP = "sum", "length", "root", "quotient", "shift", "exp"
SCALE = "scale"
#: Families whose output has the codes of their first input.
KEEPS_CODES = frozenset((MOVE, PEAK))
#: Families that sum products or elements in int32.
ACCUMULATES = frozenset((CONTRACTION, PRODUCT, MUL, MEAN, AVERAGE))
#: Families that read int32 numbers and give int32 numbers. Only an integer-only graph has these, and softmax: elsewhere
#: floats are more accurate and cost little.
WIDE = frozenset((NORM, SUM, LENGTH, ROOT, QUOTIENT, SHIFT, EXP, SCALE))
INTEGER_ONLY = WIDE | {SOFTMAX}


@dataclass(frozen=True)
class Form:
    """How a node could run on integers.

    Attributes:
        family: one of the names above; "none" when there is no integer form.
        inputs: the values it would read as codes.
        output: the value it computes: behind the bias where one is added to a contraction.
        reason: why there is no integer form.
    """

    family: str
    inputs: tuple[ir.Value, ...] = ()
    output: ir.Value | None = None
    reason: str = ""


def declined(reason: str) -> Form:
    """No integer form, and why."""
    return Form(NONE, reason=reason)


def first(node: ir.Node, family: str) -> Form:
    """A form that reads the first input of a node with one result."""
    source = node.inputs[0]
    if source is None or edit.constant(source) is not None:
        return declined("its data are constant")
    return Form(family, (source,), node.outputs[0])


def reduced_axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes that a GlobalAveragePool, GlobalMaxPool, ReduceMean or ReduceMax reduces, from the front."""
    rank = edit.rank(node.inputs[0])
    if rank is None:
        return None
    if node.op_type.startswith("Global"):
        return tuple(range(2, rank))
    axes = edit.integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is None:
        return None if len(node.inputs) > 1 and node.inputs[1] is not None else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def reduced_count(node: ir.Node) -> int | None:
    """How many elements one result of a mean is made of; None when that is not known."""
    source, axes = node.inputs[0], reduced_axes(node)
    if source is None or source.shape is None or not axes:
        return None
    dims = [source.shape[axis] for axis in axes]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return prod(sizes) if len(sizes) == len(dims) and 0 not in sizes else None
