"""Moves limits of codes in front of the rounding to them, where a layer's own limits are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, all_nodes, constant, insert_before, is_op, only_use, root_graph
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class ClipCodes:
    """Before: `Clip(QuantizeLinear(x, s, z), lo, hi)`, as for codes of 7 bits in a type of 8.
    After: `QuantizeLinear(Clip(x, (lo - z) s, (hi - z) s), s, z)`, which are the same codes: rounding keeps order.

    Keeps the graph when the codes have other readers or are a graph output, when there is more than one scale, and when
    a number is computed.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = False
        for node in all_nodes(model):
            if is_op(node, "QuantizeLinear") and node.graph is not None and _move_limits(node):
                modified = True
        return PassResult(model, modified)


def _move_limits(quantize: ir.Node) -> bool:
    """Move the limits of the Clip that reads a QuantizeLinear, if it can be done."""
    clip, codes = only_use(quantize.outputs[0]), quantize.outputs[0]
    if clip is None or not is_op(clip, "Clip") or clip.inputs[0] is not codes or clip.graph is not quantize.graph:
        return False
    data, scale = quantize.inputs[0], constant(quantize.inputs[1])
    given = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    zero = np.zeros((), np.int64) if given is None else constant(given)
    numbers = [value if value is None else constant(value) for value in clip.inputs[1:]]
    known = all(value is None or number is not None for value, number in zip(clip.inputs[1:], numbers, strict=True))
    if data is None or scale is None or zero is None or not known or scale.size != 1 or zero.size != 1:
        return False
    if data.dtype != ir.DataType.FLOAT or scale.dtype != np.float32 or not float(scale.reshape(())) > 0:
        return False
    limits: list[ir.Value | None] = []
    for label, number in zip(("lowest", "highest"), numbers, strict=False):
        steps = None if number is None else int(number.reshape(())) - int(zero.reshape(()))
        bound = None if steps is None else np.float32(steps) * scale.reshape(())
        name = f"{codes.name}.{label}"
        limits.append(None if bound is None else add_initializer(root_graph(quantize), name, np.asarray(bound)))
    quantize.replace_input_with(0, insert_before(quantize, "Clip", [data, *limits], like=data))
    edit.replace(clip, codes)
    return True
