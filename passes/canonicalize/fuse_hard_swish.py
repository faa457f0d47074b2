"""Recognises HardSigmoid and HardSwish that an exporter took apart."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import producer, scalar
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.match import close, fuse_each, other_input, scaled, shifted, sole_reader

_SIXTH = 1.0 / 6.0
#: Exporters print 1/6 with as few as six digits.
_DIGITS = 1e-5


@dataclass(frozen=True)
class FuseHardSwish:
    """Before: x clip(x + 3, 0, 6) / 6 in any order, or x HardSigmoid<1/6, 1/2>(x). After: `HardSwish(x)`.
    Before: clip(x + 3, 0, 6) / 6. After: `HardSigmoid<1/6, 1/2>(x)`. (Howard et al., arXiv 1905.02244, section 5.2.)

    Keeps the graph when a constant is another number, when the product is with another value than x, and when a part in
    the middle has other readers or is a graph output.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        clips, sigmoids = fuse_each(model, _fuse_clip, "Clip"), fuse_each(model, _fuse_hard_sigmoid, "HardSigmoid")
        return PassResult(model, clips.modified or sigmoids.modified)


def _fuse_clip(node: ir.Node) -> bool:
    data = _shifted_by_three(node)
    if data is None:
        return False
    product = sole_reader(node.outputs[0], "Mul")
    if product is not None and other_input(product, node.outputs[0]) is data:
        last = _divided_by_six(product.outputs[0])
        if last is not None:
            edit.replace_with(last, "HardSwish", [data])
            return True
    last = _divided_by_six(node.outputs[0])
    if last is None:
        return False
    edit.replace_with(last, "HardSigmoid", [data], alpha=_SIXTH, beta=0.5)
    return True


def _shifted_by_three(clip: ir.Node) -> ir.Value | None:
    """x of clip(x + 3, 0, 6)."""
    found = shifted(clip.inputs[0])
    low = scalar(clip.inputs[1]) if len(clip.inputs) > 1 else None
    high = scalar(clip.inputs[2]) if len(clip.inputs) > 2 else None
    if found is None or not close(found[1], 3.0) or low is None or not close(low, 0.0) or not close(high, 6.0):
        return None
    return found[0]


def _divided_by_six(value: ir.Value) -> ir.Node | None:
    for op_type in ("Div", "Mul"):
        node = sole_reader(value, op_type)
        found = scaled(node.outputs[0]) if node is not None else None
        if found is not None and found[0] is value and close(found[1], _SIXTH, _DIGITS):
            return node
    return None


def _fuse_hard_sigmoid(node: ir.Node) -> bool:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    data = node.inputs[0]
    product = sole_reader(node.outputs[0], "Mul")
    if data is None or product is None or not close(alpha, _SIXTH, _DIGITS) or beta != 0.5:
        return False
    if other_input(product, node.outputs[0]) is not data or producer(product.outputs[0], "Mul") is None:
        return False
    edit.replace_with(product, "HardSwish", [data])
    return True
