"""Einsum as one sum of products over the labels that the result lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Index, Lazy, Value

# Labels of the dimensions that an ellipsis stands for, counted from the last.
_ELLIPSIS = "0123456789"


def parse(node: ir.Node, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Labels of every operand and of the result; an ellipsis becomes digits."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise refuse(node, "the equation does not fit the operands", got=equation, remedy="repair the model")
    operands, widest = [], ""
    for term, rank in zip(terms, ranks, strict=True):
        extra = rank - len(term.replace("...", "")) if "..." in term else 0
        if extra < 0 or extra > len(_ELLIPSIS) or ("..." not in term and len(term) != rank):
            raise refuse(node, "the equation does not fit the operands", got=equation, remedy="repair the model")
        labels = _ELLIPSIS[:extra][::-1]
        widest = max(widest, labels, key=len)
        operands.append(term.replace("...", labels))
    if not arrow:
        letters = "".join(operands)
        once = sorted(label for label in set(letters) - set(_ELLIPSIS) if letters.count(label) == 1)
        return operands, widest + "".join(once)
    return operands, right.replace("...", widest)


def einsum(ctx: Context, node: ir.Node) -> Value:
    """Einsum; the products of 16-bit floats are summed in float32."""
    values = [attributes.value(ctx, node, index) for index in range(len(node.inputs))]
    operands, result = parse(node, [len(value.shape) for value in values])
    sizes: dict[str, Dim] = {}
    for labels, value in zip(operands, values, strict=True):
        for label, dim in zip(labels, value.shape, strict=True):
            if label not in sizes or (dims.is_static(sizes[label]) and sizes[label] == 1):
                sizes[label] = dim
    dtype = values[0].dtype
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    lazies = [ctx.lazy(ctx.tensor(value)) for value in values]
    summed = [label for label in sizes if label not in result]
    shape = tuple(sizes[label] for label in result)

    def build(group: Group) -> list[TeTensor]:
        axes = {label: te.reduce_axis((0, dims.expression(sizes[label])), f"k_{label}") for label in summed}

        def element(indices: Sequence[Index]) -> Any:
            place = {label: axis.var for label, axis in axes.items()} | dict(zip(result, indices, strict=True))
            total = None
            for labels, lazy in zip(operands, lazies, strict=True):
                factor = scalar.cast(lazy.element(group, _place(labels, lazy, place)), wide)
                total = factor if total is None else total * factor
            return te.sum(total, axis=list(axes.values())) if axes else total

        return [compute(shape, element, "einsum")]

    found = ctx.kernel("einsum", [(shape, wide)], build, kind="reduce" if summed else "injective")[0]
    if wide == dtype:
        return found
    source = ctx.lazy(found)
    return Lazy(lambda group, i: scalar.cast(source.element(group, i), dtype), shape, dtype, 2)


def _place(labels: str, lazy: Lazy, place: dict[str, Any]) -> list[Index]:
    """Indices of an operand; dimensions of size 1 repeat."""
    zero = tirx.IntImm("int64", 0)
    return [
        zero if dims.is_static(dim) and dim == 1 else place[label]
        for label, dim in zip(labels, lazy.shape, strict=True)
    ]


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Einsum": einsum}
