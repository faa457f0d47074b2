"""Means of codes.

Before:
    GlobalAveragePool(x), ReduceMean(x, axes); AveragePool(x)
After:
    ReduceSum(Cast<int32>(x.q) - zero, axes); ConvInteger(x.q, ones, x.zero), one group a channel
    and kbitc::Requantize with 1 / count inside its multiplier
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.allocate import forms
from kbitc.passes.rewrite.quantize_static.builder import I32, Builder, Sums


def mean(builder: Builder, node: ir.Node) -> Sums:
    """The sum over the reduced axes; its step is that of x over the count."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    codes = builder.codes_of(source)
    wide = builder.emit(node, "Cast", [builder.read(source, node)], f"{node.name}.wide", I32, source.shape, to=int(I32))
    centred = wide
    if codes.zero:
        zero = builder.zero(codes, np.int32)
        centred = builder.emit(node, "Sub", [wide, zero], f"{node.name}.centred", I32, source.shape)
    axes = builder.constant(f"{node.name}.axes", np.array(forms.reduced_axes(node), np.int64))
    keep = 1 if node.op_type.startswith("Global") else node.attributes.get_int("keepdims", 1)
    total = builder.emit(node, "ReduceSum", [centred, axes], f"{node.name}.sum", I32, output.shape, keepdims=keep)
    return Sums(total, np.array([codes.scale / (forms.reduced_count(node) or 1)]), 0)


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
