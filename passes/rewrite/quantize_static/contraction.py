"""Conv and MatMul on codes.

Before:
    Add(Conv(x, W), b) or Conv(x, W, b); Add(MatMul(x, W), b); MatMul(a, b)
After:
    Add(ConvInteger(x.q, levels, x.zero), round(b / (x.scale W.scale)))        i32, then see `apply.finish`
    MatMulInteger(a.q, b.q, a.zero, b.zero)                                    i32
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit, ops
from kbitc.graph import integer_functions as integer
from kbitc.passes.allocate.proofs import float_bias, integer_bias, output_scales, whole_levels
from kbitc.passes.rewrite.quantize_static.builder import I8, I32, Builder, Sums
from kbitc.quant.packing import pack_dense
from kbitc.quant.scheme import ScaleCode
from kbitc.quant.tensor import QTensor

#: Levels of so many bits are stored as they are.
WHOLE_BYTES = 8


def contraction(builder: Builder, node: ir.Node) -> Sums:
    """ConvInteger or MatMulInteger with constant levels, bias added."""
    source = builder.form(node).inputs[0]
    codes = builder.codes_of(source)
    weight, kind = ops.weight_source(node)
    if weight is None or weight.name is None:
        raise ValueError("a contraction without a weight")
    tensor = builder.tensors[weight.name]
    inputs = [builder.read(source, node), _levels(builder, node, weight, kind, tensor), builder.zero(codes)]
    op_type, attrs = ("ConvInteger", _window(node)) if node.op_type == "Conv" else ("MatMulInteger", {})
    output = node.outputs[0]
    total = builder.emit(node, op_type, inputs, f"{node.name}.integer", I32, output.shape, **attrs)
    axis = 1 if node.op_type == "Conv" else (edit.rank(output) or 1) - 1
    if float_bias(node) is not None:
        behind = (edit.rank(output) or 1) - axis - 1
        bias = integer_bias(node, codes, tensor).astype(np.int32).reshape(-1, *(1,) * behind)
        shape = bias if axis != 1 or node.op_type != "Conv" else bias[None]
        held = builder.constant(f"{node.name}.bias_levels", shape)
        total = builder.emit(node, "Add", [total, held], f"{node.name}.bias", I32, output.shape)
    return Sums(total, output_scales(codes, tensor), axis)


def product(builder: Builder, node: ir.Node) -> Sums:
    """MatMulInteger of two activations."""
    left, right = builder.form(node).inputs
    a, b = builder.codes_of(left), builder.codes_of(right)
    inputs = [builder.read(left, node), builder.read(right, node), builder.zero(a), builder.zero(b)]
    shape = node.outputs[0].shape
    total = builder.emit(node, "MatMulInteger", inputs, f"{node.name}.integer", I32, shape)
    return Sums(total, np.array([a.scale * b.scale]), 0)


def _window(node: ir.Node) -> dict[str, object]:
    """The attributes of a Conv, which ConvInteger shares."""
    found: dict[str, object] = {}
    for name in ("dilations", "kernel_shape", "pads", "strides"):
        if name in node.attributes:
            found[name] = list(node.attributes.get_ints(name, ()))
    if "group" in node.attributes:
        found["group"] = node.attributes.get_int("group", 1)
    if "auto_pad" in node.attributes:
        found["auto_pad"] = node.attributes.get_string("auto_pad", "NOTSET")
    return found


def _levels(builder: Builder, node: ir.Node, weight: ir.Value, kind: str, tensor: QTensor) -> ir.Value:
    """The int8 levels in the layout of the operator: an initializer, or kbitc::LevelsKBit under 8 bits."""
    shape = tuple(int(dim) for dim in weight.const_value.shape.numpy()) if weight.const_value is not None else ()
    name = weight.name or ""
    if kind == "embedding":
        kind, shape = "matmul", (shape[1], shape[0])
    if tensor.bits == WHOLE_BYTES:
        held = ops.from_view(whole_levels(tensor).astype(np.int8), kind, shape)
        return builder.constant(f"{name}.levels", held)
    stream = builder.constant(f"{name}.codes", pack_dense(tensor.codes, tensor.bits))
    grid = builder.constant(f"{name}.grid", tensor.format.grid)
    sizes = builder.constant(f"{name}.shape", np.array(tensor.shape, np.int64))
    view_shape = ir.Shape(tensor.shape)
    op_type, inputs, attrs = integer.LEVELS, [stream, grid, sizes], {"bits": tensor.bits}
    if tensor.scheme.scale_code is ScaleCode.INTEGER:
        factors = builder.constant(f"{name}.factors", tensor.scale_codes().astype(np.int8))
        op_type, inputs, attrs["block"] = integer.BLOCK_LEVELS, [stream, grid, factors, sizes], tensor.block
    value = builder.emit(node, op_type, inputs, f"{name}.view", I8, view_shape, **attrs)
    n, taps, channels = tensor.shape
    if kind == "conv":
        order = ir.Shape([n, channels, taps])
        value = builder.emit(node, "Transpose", [value], f"{name}.channels_first", I8, order, perm=[0, 2, 1])
    rows = [shape[1], shape[0]] if kind == "matmul" else list(shape)
    wanted = builder.constant(f"{name}.onnx_shape", np.array(rows, np.int64))
    value = builder.emit(node, "Reshape", [value, wanted], f"{name}.levels", I8, ir.Shape(rows))
    if kind == "matmul":
        value = builder.emit(node, "Transpose", [value], f"{name}.turned", I8, ir.Shape(rows[::-1]), perm=[1, 0])
    return value
