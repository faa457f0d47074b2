"""Small questions about the neighbourhood of a node, for passes that recognise a decomposed operator."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kbitc.graph import dims, edit
from kbitc.graph.edit import all_nodes, integers, is_op, only_use, producer, scalar
from kbitc.passes.base import PassResult

#: A decomposed operator's constants carry the rounding of float32; this bounds it (8 units of 2^-23).
CONSTANT_TOLERANCE = 1e-6


def fuse_each(model: ir.Model, fuse: Callable[[ir.Node], bool], *operators: str) -> PassResult:
    """Offer every node of some operators to `fuse`, which says whether it replaced it; remove what is dead then."""
    modified = False
    for node in all_nodes(model):
        if node.graph is not None and is_op(node, *operators):
            modified = fuse(node) or modified
    if modified:
        edit.remove_dead(model)
    return PassResult(model, modified)


def close(found: float | None, wanted: float, tolerance: float = CONSTANT_TOLERANCE) -> bool:
    """Whether a constant is `wanted` up to float32 rounding of its decimal spelling."""
    return found is not None and abs(found - wanted) <= tolerance * max(1.0, abs(wanted))


def with_scalar(node: ir.Node | None, op_type: str) -> tuple[ir.Value, float] | None:
    """(x, c) of `x op c` with a constant of one element that does not widen x; `c op x` too for Add and Mul."""
    if node is None or not is_op(node, op_type):
        return None
    orders = ((0, 1), (1, 0)) if op_type in ("Add", "Mul") else ((0, 1),)
    for data, other in orders:
        source, number = node.inputs[data], scalar(node.inputs[other])
        narrow = (edit.rank(node.inputs[other]) or 0) <= max(edit.rank(source) or 0, 0)
        if source is not None and number is not None and narrow and edit.constant(source) is None:
            return source, number
    return None


def scaled(value: ir.Value | None) -> tuple[ir.Value, float, ir.Node] | None:
    """(x, c, node) when `value` is `x * c` or `x / c'` with c = 1/c'."""
    node = value.producer() if value is not None else None
    product = with_scalar(node, "Mul")
    if product is not None and node is not None:
        return product[0], product[1], node
    quotient = with_scalar(node, "Div")
    if quotient is not None and node is not None and quotient[1]:
        return quotient[0], 1.0 / quotient[1], node
    return None


def shifted(value: ir.Value | None) -> tuple[ir.Value, float, ir.Node] | None:
    """(x, c, node) when `value` is `x + c` or `x - c'` with c = -c'."""
    node = value.producer() if value is not None else None
    total = with_scalar(node, "Add")
    if total is not None and node is not None:
        return total[0], total[1], node
    difference = with_scalar(node, "Sub")
    if difference is not None and node is not None:
        return difference[0], -difference[1], node
    return None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a node with two inputs; `value` itself when both are the same."""
    first, second = node.inputs[0], node.inputs[1]
    return second if first is value else first


def sole_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only reader of `value` when it is an `op_type`, else None."""
    node = only_use(value)
    return node if node is not None and is_op(node, op_type) else None


def reduced(value: ir.Value | None, op_type: str) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(x, axes) when `value` is `op_type(x, axes)` with its axes kept as 1, by itself or by a Reshape or Unsqueeze."""
    maker = value.producer() if value is not None else None
    reshaped = maker is not None and is_op(maker, "Reshape", "Unsqueeze")
    found = reduction(maker.inputs[0] if reshaped and maker is not None else value, op_type)
    before, after = dims.of(found[0]) if found is not None else None, dims.of(value)
    if found is None or before is None or after is None or len(before) != len(after):
        return None
    kept = [1 if axis in found[1] else dim for axis, dim in enumerate(before)]
    return found if all(dims.same(left, right) for left, right in zip(kept, after, strict=True)) else None


def reduction(value: ir.Value | None, op_type: str) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(x, axes) when `value` is `op_type(x, axes)` with constant axes, made non-negative and sorted."""
    node = producer(value, op_type) if value is not None else None
    if node is None or node.inputs[0] is None:
        return None
    size = edit.rank(node.inputs[0])
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if size is None or not axes:
        return None
    return node.inputs[0], tuple(sorted(axis % size for axis in axes))


def square(value: ir.Value | None) -> ir.Value | None:
    """x when `value` is `x * x` or `x ** 2`."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if node.op_type == "Pow" and scalar(node.inputs[1]) == 2.0:
        return node.inputs[0]
    return None


def factors(value: ir.Value | None, limit: int = 6) -> tuple[float, list[ir.Value]] | None:
    """A product taken apart: (constant factor, other factors), through Mul and Pow with exponent 2 or 3.

    None when there are more than `limit` factors.
    """
    if value is None:
        return None
    number, rest = 1.0, [value]
    found: list[ir.Value] = []
    while rest:
        item = rest.pop()
        node = item.producer()
        constant_factor = scalar(item)
        if constant_factor is not None:
            number *= constant_factor
        elif node is not None and is_op(node, "Mul"):
            rest += [operand for operand in node.inputs if operand is not None]
        elif node is not None and is_op(node, "Pow") and scalar(node.inputs[1]) in (2.0, 3.0):
            rest += [operand for operand in node.inputs[:1] if operand is not None] * int(scalar(node.inputs[1]) or 0)
        else:
            found.append(item)
        if len(found) + len(rest) > limit:
            return None
    return number, found
