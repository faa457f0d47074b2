"""Means of codes.

Before:
    GlobalAveragePool(x), ReduceMean(x, axes); AveragePool(x)
After:
    ReduceSum(Cast<int32>(x.q) - zero, axes); ConvInteger(x.q, ones, x.zero), one group a channel
    and kbitc::Requantize with 1 / count inside its multiplier; a count that is only known at run time divides in
    kbitc::IntegerSum(Cast<int32>(x.q) - zero, axes, 2^14, count)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit, integer_reduce
from kbitc.graph.integer_reduce import MEAN_BITS
from kbitc.passes.allocate import families
from kbitc.passes.rewrite.quantize_static.builder import I32, I64, Builder, Sums

MEAN_LIMIT = 255 << MEAN_BITS


def mean(builder: Builder, node: ir.Node) -> Sums:
    """The sum over the reduced axes; its step is that of x over the count."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    codes = builder.codes_of(source)
    wide = builder.emit(node, "Cast", [builder.read(source, node)], f"{node.name}.wide", I32, source.shape, to=int(I32))
    centred = wide
    if codes.zero:
        zero = builder.zero(codes, np.int32)
        centred = builder.emit(node, "Sub", [wide, zero], f"{node.name}.centred", I32, source.shape)
    axes = builder.constant(f"{node.name}.axes", np.array(families.reduced_axes(node), np.int64))
    keep = 1 if node.op_type.startswith("Global") else node.attributes.get_int("keepdims", 1)
    if families.reduced_count(node) is None:
        numbers = [builder.scalar(1 << MEAN_BITS, np.int64), _count(builder, node, centred, axes)]
        inputs = [centred, axes, *numbers, builder.scalar(MEAN_LIMIT, np.int64)]
        made = builder.emit(node, integer_reduce.SUM, inputs, f"{node.name}.mean", I32, output.shape, keepdims=keep)
        return Sums(made, np.array([codes.scale / (1 << MEAN_BITS)]), 0, MEAN_LIMIT)
    total = builder.emit(node, "ReduceSum", [centred, axes], f"{node.name}.sum", I32, output.shape, keepdims=keep)
    return Sums(total, np.array([codes.scale / (families.reduced_count(node) or 1)]), 0)


def _count(builder: Builder, node: ir.Node, x: ir.Value, axes: ir.Value) -> ir.Value:
    """The number of elements under a mean, at least 1, i64 scalar."""
    dims = builder.emit(node, "Shape", [x], f"{node.name}.dims", I64, None)
    sizes = builder.emit(node, "Gather", [dims, axes], f"{node.name}.sizes", I64, axes.shape)
    count = builder.emit(node, "ReduceProd", [sizes], f"{node.name}.count", I64, ir.Shape([]), keepdims=0)
    one = builder.scalar(1, np.int64)
    return builder.emit(node, "Max", [count, one], f"{node.name}.divisor", I64, ir.Shape([]))


def average(builder: Builder, node: ir.Node) -> Sums:
    """The sum under each window, as a convolution with ones."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    codes = builder.codes_of(source)
    kernel = list(node.attributes.get_ints("kernel_shape", ()))
    channels = source.shape[1] if source.shape is not None else 1
    count = channels if isinstance(channels, int) else 1
    ones = builder.constant(f"{node.name}.ones", np.ones((count, 1, *kernel), np.int8))
    names = ("dilations", "pads", "strides")
    attrs = {name: list(node.attributes.get_ints(name, ())) for name in names if name in node.attributes}
    inputs = [builder.read(source, node), ones, builder.zero(codes)]
    auto = {"auto_pad": node.attributes.get_string("auto_pad", "NOTSET")} if "auto_pad" in node.attributes else {}
    total = builder.emit(
        node, "ConvInteger", inputs, f"{node.name}.sum", I32, output.shape,
        kernel_shape=kernel, group=count, **attrs, **auto,
    )  # fmt: skip
    return Sums(total, np.array([codes.scale / int(np.prod(kernel))]), 0 if edit.rank(output) is None else 1)
