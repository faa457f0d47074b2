"""Operators that only move codes, or take the largest of some.

Before:
    Reshape(x), Transpose(x), MaxPool(x), Pad(x, 0.0) ...; GlobalMaxPool(x); Concat(a, b)
After:
    the same on x.q; Pad fills with the zero point; ReduceMax(x.q) over the places; Concat of codes that a kbitc::Table
    brings to the result's scale where they have another
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.allocate import families
from kbitc.passes.rewrite.quantize_static.builder import U8, Builder
from kbitc.passes.rewrite.quantize_static.elementwise import constant_codes, table, table_entries
from kbitc.quant.static import Codes


def move(builder: Builder, node: ir.Node) -> None:
    """The same node on codes."""
    source = builder.form(node).inputs[0]
    array = edit.constant(source)
    codes = (
        builder.read(source, node)
        if array is None
        else constant_codes(builder, source, array, builder.codes_of(source))
    )
    inputs: list[ir.Value | None] = [codes, *node.inputs[1:]]
    if node.op_type == "Pad":
        fill = builder.zero(builder.codes_of(source))
        inputs = [*inputs[:2], fill, *inputs[3:]]
    if node.op_type == "GlobalMaxPool":
        axes = np.array(families.reduced_axes(node), np.int64)
        inputs = [inputs[0], builder.constant(f"{node.name}.axes", axes)]
    op_type = "ReduceMax" if node.op_type == "GlobalMaxPool" else node.op_type
    copy = ir.Node("", op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
    copy.name = f"{node.name}.codes"
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = edit.fresh_name(builder.model.graph, f"{old.name}.q")
        new.type, new.shape = ir.TensorType(U8), old.shape
        builder.codes[old] = new
    edit.root_graph(node).insert_before(node, copy)


def concat(builder: Builder, node: ir.Node) -> None:
    """Concat of codes with the scale of the result."""
    output = node.outputs[0]
    wanted = builder.codes_of(output)
    inputs = [_with_codes(builder, value, wanted, node) for value in builder.form(node).inputs]
    axis = node.attributes.get_int("axis", 0)
    builder.codes[output] = builder.emit(node, "Concat", inputs, f"{output.name}.q", U8, output.shape, axis=axis)


def _with_codes(builder: Builder, value: ir.Value, wanted: Codes, node: ir.Node) -> ir.Value:
    array = edit.constant(value)
    if array is not None:
        builder.codes.pop(value, None)
        return constant_codes(builder, value, array, wanted)
    codes = builder.read(value, node)
    found = builder.codes_of(value)
    if found == wanted:
        return codes
    return table(builder, codes, table_entries(found, wanted), value, node)
