"""What is computed on int32 numbers finer than codes: normalizations, softmax, sums, quotients, roots, exp.

Before:
    Softmax(Add(scores, mask)); LayerNormalization(Add(dense, residual))
After:
    kbitc::IntegerSoftmax(Add(kbitc::Rescale(scores), kbitc::Rescale(mask)))           codes of scale 1 / 255
    kbitc::IntegerLayerNorm(Add(kbitc::Rescale(dense), kbitc::Rescale(residual)))      i32
    kbitc::IntegerSum, IntegerReduceL2, IntegerSqrt, IntegerQuotient, IntegerExp; Clip and Add with constants  i32
Only integer-only graphs have these: 8 bits of a residual stream or of logits lose too much.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit, integer_reduce
from kbitc.graph import integer_functions as integer
from kbitc.graph import integer_nonlinear as nonlinear
from kbitc.graph.integer_reduce import WIDE_LIMIT
from kbitc.passes.allocate import families, wide_forms
from kbitc.passes.allocate.static import LOGIT_SCALE
from kbitc.passes.rewrite.quantize_static.builder import I32, U8, Builder, Sums

#: Limit of int32 numbers that are summed in pairs for a normalization: |x| <= 2^17.
NORM_LIMIT = 1 << (nonlinear.NORM_BITS - 1)
#: The largest number of a constant operand.
CONSTANT_STEPS = 1 << 24
#: Fraction bits that a square root adds: 2^31 4^14 < 2^60.
SQRT_BITS = 14


def wide(builder: Builder, value: ir.Value, before: ir.Node, scale: float, limit: int) -> ir.Value:
    """A value as int32 numbers of the given step, limited to [-limit, limit]."""
    array = edit.constant(value)
    if array is not None:
        held = np.clip(np.rint(array / scale), -limit, limit).astype(np.int32)
        return builder.constant(f"{value.name}.wide", held)
    sums = source_of(builder, value, before)
    if sums.scales.size == 1 and float(sums.scales[0]) == scale and sums.limit <= limit:
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
        return Sums(sums.value, sums.scales * found[1], sums.axis, sums.limit)
    codes = builder.codes_of(value)
    made = builder.read(value, before)
    number = builder.emit(before, "Cast", [made], f"{value.name}.number", I32, value.shape, to=int(I32))
    if codes.zero:
        zero = builder.zero(codes, np.int32)
        number = builder.emit(before, "Sub", [number, zero], f"{value.name}.centred", I32, value.shape)
    return Sums(number, np.array([codes.scale]), 0, codes.high)


def wide_sum(builder: Builder, node: ir.Node) -> Sums:
    """Add or Sub of int32 numbers of one step."""
    output = node.outputs[0]
    scale = builder.plan.wide_scale(output.name)
    limit = WIDE_LIMIT if scale == LOGIT_SCALE else NORM_LIMIT
    inputs = [wide(builder, value, node, scale, limit) for value in builder.form(node).inputs]
    made = builder.emit(node, node.op_type, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.array([scale]), 0, 2 * limit)


def softmax(builder: Builder, node: ir.Node) -> None:
    """IntegerSoftmax of int32 numbers with one step."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    sums = source_of(builder, source, node)
    x, scale = sums.value, float(sums.scales[0])
    if sums.scales.size > 1:
        x, scale = wide(builder, source, node, LOGIT_SCALE, 2 * WIDE_LIMIT), LOGIT_SCALE
    multiplier, shift = exponent_factor(scale)
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
    centred = node.op_type == "LayerNormalization"
    held = [builder.constant(f"{node.name}.bias", np.rint(bias).astype(np.int32))] if centred else []
    inputs = [
        x,
        builder.constant(f"{node.name}.gain", np.rint(gain * 2.0**shift).astype(np.int32)),
        *held,
        builder.scalar(int(np.clip(round(epsilon), 1, 1 << 60)), np.int64),
        builder.scalar(shift),
    ]
    op_type = nonlinear.LAYER_NORM if centred else nonlinear.RMS_NORM
    made = builder.emit(node, op_type, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.array([scale]), 0)


def total(builder: Builder, node: ir.Node) -> Sums:
    """IntegerSum in steps of its input, exact below 2^29 of them."""
    sums = _one_step(builder, builder.form(node).inputs[0], node)
    one = builder.scalar(1, np.int64)
    inputs = [sums.value, _axes(builder, node), one, one, builder.scalar(WIDE_LIMIT, np.int64)]
    keep = node.attributes.get_int("keepdims", 1)
    output = node.outputs[0]
    made = builder.emit(node, integer_reduce.SUM, inputs, f"{output.name}.wide", I32, output.shape, keepdims=keep)
    return Sums(made, sums.scales, 0, WIDE_LIMIT)


def length(builder: Builder, node: ir.Node) -> Sums:
    """IntegerReduceL2 with as many more fraction bits as the number of elements leaves room for."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    step = builder.plan.wide_scale(source.name)
    x = wide(builder, source, node, step, 2 * NORM_LIMIT)
    bits = integer_reduce.norm2_bits(families.reduced_count(node) or 1)
    inputs = [x, _axes(builder, node), builder.scalar(4**bits, np.int64)]
    keep = node.attributes.get_int("keepdims", 1)
    made = builder.emit(node, integer_reduce.NORM2, inputs, f"{output.name}.wide", I32, output.shape, keepdims=keep)
    return Sums(made, np.array([step / 2**bits]), 0, 1 << (integer_reduce.ROOT_BITS // 2))


def root(builder: Builder, node: ir.Node) -> Sums:
    """IntegerSqrt with 14 more fraction bits."""
    output = node.outputs[0]
    sums = _one_step(builder, builder.form(node).inputs[0], node)
    inputs = [sums.value, builder.scalar(4**SQRT_BITS, np.int64)]
    made = builder.emit(node, integer_reduce.SQRT, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.sqrt(sums.scales) / 2**SQRT_BITS, 0, 1 << 30)


def quotient(builder: Builder, node: ir.Node) -> Sums:
    """IntegerQuotient; its step is the operands' over a power of two, the largest not above the plan's."""
    output, inputs = node.outputs[0], builder.form(node).inputs
    below = _one_step(builder, inputs[-1], node)
    above = _one_step(builder, inputs[0], node) if len(inputs) > 1 else Sums(builder.scalar(1), np.ones(1), 0, 1)
    ratio = float(above.scales[0] / below.scales[0])
    most = integer_reduce.MAX_FACTOR_BITS
    bits = int(np.clip(math.ceil(math.log2(ratio / builder.plan.wide_scale(output.name))), -most, most))
    numbers = [1 << max(bits, 0), 1 << max(-bits, 0), WIDE_LIMIT]
    operands = [above.value, below.value, *(builder.scalar(number, np.int64) for number in numbers)]
    made = builder.emit(node, integer_reduce.QUOTIENT, operands, f"{output.name}.wide", I32, output.shape)
    return Sums(made, np.array([ratio * 2.0**-bits]), 0, WIDE_LIMIT)


def shift(builder: Builder, node: ir.Node) -> Sums:
    """Relu, Clip, Max, Min, Add and Sub with constants, which are rounded to the step."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    sums = _one_step(builder, source, node)
    scale = float(sums.scales[0])

    def steps(value: ir.Value) -> ir.Value:
        number = edit.scalar(value)
        return builder.scalar(int(np.clip(np.rint((number or 0.0) / scale), -WIDE_LIMIT, WIDE_LIMIT)))

    op_type, limit = node.op_type, sums.limit
    inputs: list[ir.Value | None] = [None if value is None else steps(value) for value in node.inputs]
    inputs = [sums.value if value is source else made for value, made in zip(node.inputs, inputs, strict=True)]
    if op_type == "Relu":
        op_type, inputs = "Clip", [sums.value, builder.scalar(0)]
    if op_type in ("Add", "Sub"):
        inputs[0 if node.inputs[0] is source else 1] = wide(builder, source, node, scale, WIDE_LIMIT)
        limit = 2 * WIDE_LIMIT
    made = builder.emit(node, op_type, inputs, f"{output.name}.wide", I32, output.shape)
    return Sums(made, sums.scales, 0, max(limit, WIDE_LIMIT))


def scale(builder: Builder, node: ir.Node) -> Sums:
    """A positive factor a channel: the same numbers in other steps."""
    found = wide_forms.channel_factors(node)
    if found is None:
        raise InternalError("a product has no factors", where=edit.describe(node))
    sums = _one_step(builder, found[0], node)
    return Sums(sums.value, sums.scales[0] * found[1], (edit.rank(node.outputs[0]) or 1) - 1, sums.limit)


def exp(builder: Builder, node: ir.Node) -> Sums:
    """IntegerExp; the largest number seen is 2^24 steps, and larger ones are as large."""
    source, output = builder.form(node).inputs[0], node.outputs[0]
    largest = builder.plan.wide_scale(output.name) * (1 << nonlinear.POWER_BITS)
    peak = int(np.clip(round(math.log(largest) / LOGIT_SCALE), -WIDE_LIMIT, WIDE_LIMIT))
    numbers = (peak, *exponent_factor(LOGIT_SCALE))
    x = wide(builder, source, node, LOGIT_SCALE, 2 * WIDE_LIMIT)
    inputs = [x, *(builder.scalar(number) for number in numbers), builder.powers()]
    made = builder.emit(node, nonlinear.EXP, inputs, f"{output.name}.wide", I32, output.shape)
    step = math.exp(peak * LOGIT_SCALE) / (1 << nonlinear.POWER_BITS)
    return Sums(made, np.array([step]), 0, 1 << nonlinear.POWER_BITS)


def exponent_factor(scale: float) -> tuple[int, int]:
    """(multiplier, shift) that bring steps of a natural exponent to 1/256 of an octave."""
    return integer.fixed_point(scale * math.log2(math.e) * (1 << nonlinear.FRACTION_BITS))


def _one_step(builder: Builder, value: ir.Value, before: ir.Node) -> Sums:
    """A value as int32 numbers with one step for all: its own, or the finest of its channels."""
    array = edit.constant(value)
    if array is not None:
        scale = float(np.abs(array).max(initial=0.0)) / CONSTANT_STEPS or 1.0
        return Sums(wide(builder, value, before, scale, CONSTANT_STEPS), np.array([scale]), 0, CONSTANT_STEPS)
    sums = source_of(builder, value, before)
    if sums.scales.size == 1:
        return sums
    scale = float(sums.scales.min())
    return Sums(wide(builder, value, before, scale, WIDE_LIMIT), np.array([scale]), 0, WIDE_LIMIT)


def _axes(builder: Builder, node: ir.Node) -> ir.Value:
    return builder.constant(f"{node.name}.axes", np.array(families.reduced_axes(node), np.int64))
