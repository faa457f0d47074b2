"""Softmax, layer normalization and the sums in front of them, on int32 numbers finer than codes.

Before:
    Softmax(Add(scores, mask)); LayerNormalization(Add(dense, residual))
After:
    kbitc::IntegerSoftmax(Add(kbitc::Rescale(scores), kbitc::Rescale(mask)))           codes of scale 1 / 255
    kbitc::IntegerLayerNorm(Add(kbitc::Rescale(dense), kbitc::Rescale(residual)))      i32
Only integer-only graphs have these: 8 bits of a residual stream or of logits lose too much.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph import integer_functions as integer
from kbitc.graph import integer_nonlinear as nonlinear
from kbitc.passes.allocate.static import LOGIT_SCALE
from kbitc.passes.rewrite.quantize_static.builder import I32, U8, Builder, Sums

#: Limits of int32 numbers that are summed in pairs: for a normalization |x| <= 2^17, for logits no overflow.
NORM_LIMIT, LOGIT_LIMIT = 1 << (nonlinear.NORM_BITS - 1), 1 << 29


def wide(builder: Builder, value: ir.Value, before: ir.Node, scale: float, limit: int) -> ir.Value:
    """A value as int32 numbers of the given step, limited to [-limit, limit]."""
    array = edit.constant(value)
    if array is not None:
        held = np.clip(np.rint(array / scale), -limit, limit).astype(np.int32)
        return builder.constant(f"{value.name}.wide", held)
    sums = source_of(builder, value, before)
    if sums.scales.size == 1 and float(sums.scales[0]) == scale:
        return sums.value
    pairs = [integer.fixed_point(float(item) / scale) for item in sums.scales]
    multiplier, shift = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    inputs = [
        sums.value,
        builder.constant(f"{value.name}.wide_multiplier", multiplier),
        builder.constant(f"{value.name}.wide_shift", shift),
    ]
    return builder.emit(
        before, nonlinear.RESCALE, inputs, f"{value.name}.wide", I32, value.shape,
        axis=sums.axis, low=-limit, high=limit,
    )  # fmt: skip


def source_of(builder: Builder, value: ir.Value, before: ir.Node) -> Sums:
    """The int32 numbers behind a value: an accumulator, or its codes less their zero point."""
    found = builder.decision.wide_source(value)
    if found is not None:
        sums = builder.sums[found[0]]
        return Sums(sums.value, sums.scales * found[1], sums.axis)
    codes = builder.codes_of(value)
    made = builder.read(value, before)
    number = builder.emit(before, "Cast", [made], f"{value.name}.number", I32, value.shape, to=int(I32))
    if codes.zero:
        zero = builder.zero(codes, np.int32)
        number = builder.emit(before, "Sub", [number, zero], f"{value.name}.centred", I32, value.shape)
    return Sums(number, np.array([codes.scale]), 0)


def wide_sum(builder: Builder, node: ir.Node) -> Sums:
    """Add or Sub of int32 numbers of one step."""
    output = node.outputs[0]
    scale = builder.plan.wide_scale(output.name)
    limit = LOGIT_LIMIT if scale == LOGIT_SCALE else NORM_LIMIT
    inputs = [wide(builder, value, node, scale, limit) for value in builder.form(node).inputs]
    made = builder.emit(node, node.op_type, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.array([scale]), 0)


def softmax(builder: Builder, node: ir.Node) -> None:
    """IntegerSoftmax of int32 numbers with one step."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    sums = source_of(builder, source, node)
    x, scale = sums.value, float(sums.scales[0])
    if sums.scales.size > 1:
        x, scale = wide(builder, source, node, LOGIT_SCALE, 2 * LOGIT_LIMIT), LOGIT_SCALE
    multiplier, shift = integer.fixed_point(scale * math.log2(math.e) * (1 << nonlinear.FRACTION_BITS))
    inputs = [x, builder.scalar(multiplier), builder.scalar(shift), builder.powers()]
    axis = node.attributes.get_int("axis", -1) % (edit.rank(output) or 1)
    builder.codes[output] = builder.emit(
        node, nonlinear.SOFTMAX, inputs, f"{output.name}.q", U8, output.shape, axis=axis
    )


def norm(builder: Builder, node: ir.Node) -> Sums:
    """IntegerLayerNorm; its gain and bias are in steps of the result."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    step, scale = builder.plan.wide_scale(source.name), builder.plan.wide_scale(output.name)
    x = wide(builder, source, node, step, 2 * NORM_LIMIT)
    constants = [edit.constant(value) for value in node.inputs[1:]]
    gain = np.asarray(constants[0], np.float64).reshape(-1) / (scale * (1 << nonlinear.RATIO_BITS))
    bias = np.zeros_like(gain) if len(constants) < 2 or constants[1] is None else constants[1].reshape(-1) / scale
    largest = max(float(np.abs(gain).max()), 2.0**-28)
    shift = int(np.clip(math.floor(math.log2(((1 << 31) - 1) / largest)), 1, 60))
    epsilon = node.attributes.get_float("epsilon", 1e-5) / step**2 * (1 << nonlinear.VARIANCE_BITS)
    inputs = [
        x,
        builder.constant(f"{node.name}.gain", np.rint(gain * 2.0**shift).astype(np.int32)),
        builder.constant(f"{node.name}.bias", np.rint(bias).astype(np.int32)),
        builder.scalar(int(np.clip(round(epsilon), 1, 1 << 60)), np.int64),
        builder.scalar(shift),
    ]
    made = builder.emit(node, nonlinear.LAYER_NORM, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.array([scale]), 0)
