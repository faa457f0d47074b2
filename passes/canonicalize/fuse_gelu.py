"""Recognises GELU that an exporter took apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import is_op, producer
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.match import close, factors, fuse_each, other_input, scaled, shifted, sole_reader

#: Constants of the tanh form: sqrt(2 / pi) and 0.044715 (Hendrycks and Gimpel, arXiv 1606.08415, section 2).
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715
#: Exporters print these constants with as few as five digits.
_DIGITS = 1e-4


@dataclass(frozen=True)
class FuseGelu:
    """Before: 0.5 x (1 + erf(x / sqrt(2))), or 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), factors in any order.
    After: `Gelu(x)`, or `Gelu<approximate="tanh">(x)`.

    Keeps the graph when a constant is another number, when the factors multiply another value than x, and when a part
    in the middle has other readers or is a graph output.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        return fuse_each(model, _fuse_either, "Erf", "Tanh")


def _fuse_either(node: ir.Node) -> bool:
    if is_op(node, "Erf"):
        return _fuse(node, _erf_argument(node), None)
    return _fuse(node, _tanh_argument(node), "tanh")


def _erf_argument(node: ir.Node) -> ir.Value | None:
    """x of erf(x / sqrt(2))."""
    found = scaled(node.inputs[0])
    return found[0] if found is not None and close(found[1], math.sqrt(0.5), _DIGITS) else None


def _tanh_argument(node: ir.Node) -> ir.Value | None:
    """x of tanh(sqrt(2/pi) (x + 0.044715 x^3))."""
    outer = scaled(node.inputs[0])
    if outer is None or not close(outer[1], _TANH_SCALE, _DIGITS):
        return None
    total = producer(outer[0], "Add")
    if total is None:
        return None
    for data, cubic in ((total.inputs[0], total.inputs[1]), (total.inputs[1], total.inputs[0])):
        found = factors(cubic)
        if data is None or found is None:
            continue
        number, values = found
        if close(number, _TANH_CUBIC, _DIGITS) and len(values) == 3 and all(value is data for value in values):
            return data
    return None


def _fuse(node: ir.Node, data: ir.Value | None, approximate: str | None) -> bool:
    if data is None:
        return False
    plus = sole_reader(node.outputs[0], "Add")
    if plus is None:
        return False
    total = shifted(plus.outputs[0])
    if total is None or not close(total[1], 1.0):
        return False
    last = _times_half_data(plus, data)
    if last is None or last.graph is not node.graph:
        return False
    edit.replace_with(last, "Gelu", [data], approximate=approximate)
    return True


def _times_half_data(plus: ir.Node, data: ir.Value) -> ir.Node | None:
    """The node that makes 0.5 * data * (1 + f), whatever the order of the two products."""
    product = sole_reader(plus.outputs[0], "Mul")
    if product is None:
        return None
    other = other_input(product, plus.outputs[0])
    half = scaled(other)
    if half is not None and half[0] is data and close(half[1], 0.5):
        return product
    if other is data:
        return _reader_that_scales(product.outputs[0], 0.5)
    own = scaled(product.outputs[0])
    if own is not None and own[0] is plus.outputs[0] and close(own[1], 0.5):
        outer = sole_reader(product.outputs[0], "Mul")
        return outer if outer is not None and other_input(outer, product.outputs[0]) is data else None
    return None


def _reader_that_scales(value: ir.Value, factor: float) -> ir.Node | None:
    for op_type in ("Mul", "Div"):
        node = sole_reader(value, op_type)
        found = scaled(node.outputs[0]) if node is not None else None
        if found is not None and found[0] is value and close(found[1], factor):
            return node
    return None
