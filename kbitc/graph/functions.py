"""The model-local ONNX functions that give kbitc's own operators a meaning in standard operators.

Any runtime that knows ONNX functions executes a quantized model through these bodies; the lowering replaces them by
kernels that compute the same floating-point operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from kbitc.graph import integer_functions, integer_nonlinear, integer_reduce
from kbitc.graph.integer_text import BLOCK_OF_CHANNEL
from kbitc.graph.shapes import infer_shapes

DOMAIN = "kbitc"
DYNAMIC_QUANTIZE = "DynamicQuantize"
DEQUANTIZE = "DequantizeKBit"
DEQUANTIZE_OFFSET = "DequantizeKBitOffset"
UNPACK = "UnpackKBit"

#: Functions without a kernel.
PLAIN = frozenset((*integer_reduce.BODIES, integer_nonlinear.EXP))

# Keeps 127 / amax finite when a block is all zero or denormal.
MIN_AMAX = 1e-30
ACTIVATION_LIMIT = 127

_BODIES = {
    # Along axis, in blocks of `block` (after = axis + 1): int8 codes at run time, given back as floats.
    DYNAMIC_QUANTIZE: """
<domain: "kbitc", opset_import: ["" : {opset}]>
DynamicQuantize <axis, after, block> (X) => (Y) {{
    shape = Shape(X)
    one = Constant<value_ints = [1]>()
    zero = Constant<value_ints = [0]>()
    zeros4 = Constant<value_ints = [0, 0, 0, 0]>()
    before = Shape<start: int = 0, end: int = @axis>(X)
    before1 = Concat<axis = 0>(one, before)
    outer = ReduceProd<keepdims = 1>(before1)
    dim = Shape<start: int = @axis, end: int = @after>(X)
    behind = Shape<start: int = @after>(X)
    behind1 = Concat<axis = 0>(one, behind)
    inner = ReduceProd<keepdims = 1>(behind1)
    block0 = Constant<value_int: int = @block>()
    block1 = Reshape(block0, one)
    negative = Neg(dim)
    pad = Mod(negative, block1)
    flat_shape = Concat<axis = 0>(outer, dim, inner)
    flat = Reshape<allowzero = 1>(X, flat_shape)
    pads = Concat<axis = 0>(zeros4, pad, zero)
    padded = Pad(flat, pads)
    whole = Add(dim, pad)
    count = Div(whole, block1)
    block_shape = Concat<axis = 0>(outer, count, block1, inner)
    blocks = Reshape<allowzero = 1>(padded, block_shape)
    magnitude = Abs(blocks)
    two = Constant<value_ints = [2]>()
    peak = ReduceMax<keepdims = 1>(magnitude, two)
    tiny = Constant<value_float = {tiny}>()
    amax = Max(peak, tiny)
    limit = Constant<value_float = {limit}.0>()
    low = Constant<value_float = -{limit}.0>()
    inverse = Div(limit, amax)
    ratio = Mul(blocks, inverse)
    rounded = Round(ratio)
    codes = Clip(rounded, low, limit)
    scale = Div(amax, limit)
    values = Mul(codes, scale)
    whole_shape = Concat<axis = 0>(outer, whole, inner)
    wide = Reshape<allowzero = 1>(values, whole_shape)
    cut = Slice(wide, zero, dim, one)
    Y = Reshape<allowzero = 1>(cut, shape)
}}""",
    # A dense little-endian stream of k-bit codes -> int64 codes of the given shape.
    UNPACK: """
<domain: "kbitc", opset_import: ["" : {opset}]>
UnpackKBit <bits> (stream, shape) => (codes) {{
    one = Constant<value_ints = [1]>()
    zero = Constant<value_ints = [0]>()
    minus = Constant<value_ints = [-1]>()
    column = Constant<value_ints = [-1, 1]>()
    positions = Constant<value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}>()
    lowest = Constant<value = uint8[1] {{1}}>()
    bytes = Reshape(stream, column)
    shifted = BitShift<direction = "RIGHT">(bytes, positions)
    bit = BitwiseAnd(shifted, lowest)
    line = Reshape(bit, minus)
    count = ReduceProd<keepdims = 1>(shape)
    bits0 = Constant<value_int: int = @bits>()
    bits1 = Reshape(bits0, one)
    used = Mul(count, bits1)
    kept = Slice(line, zero, used)
    table_shape = Concat<axis = 0>(minus, bits1)
    table = Reshape(kept, table_shape)
    table_f = Cast<to = 1>(table)
    start = Constant<value_int = 0>()
    step = Constant<value_int = 1>()
    exponent = Range(start, bits0, step)
    exponent_f = Cast<to = 1>(exponent)
    base = Constant<value_float = 2.0>()
    power = Pow(base, exponent_f)
    power_column = Reshape(power, column)
    value = MatMul(table_f, power_column)
    value_i = Cast<to = 7>(value)
    codes = Reshape(value_i, shape)
}}""",
    # scale * (grid[code] - zero), scales and zeros repeated over blocks along the last axis of shape [N, T, C].
    DEQUANTIZE: """
<domain: "kbitc", opset_import: ["" : {opset}, "kbitc" : 1]>
DequantizeKBit <bits, block> (stream, grid, scales, zeros, shape) => (Y) {{
    codes = kbitc.UnpackKBit<bits: int = @bits>(stream, shape)
    levels = Gather(grid, codes)"""
    + BLOCK_OF_CHANNEL
    + """
    scale = Gather<axis = 2>(scales, which)
    zero = Gather<axis = 2>(zeros, which)
    difference = Sub(levels, zero)
    Y = Mul(difference, scale)
}}""",
    # scale * (grid[code] - zero) + offset: the product is rounded, then the sum.
    DEQUANTIZE_OFFSET: """
<domain: "kbitc", opset_import: ["" : {opset}, "kbitc" : 1]>
DequantizeKBitOffset <bits, block> (stream, grid, scales, zeros, shape, offsets) => (Y) {{
    scaled = kbitc.DequantizeKBit<bits: int = @bits, block: int = @block>(stream, grid, scales, zeros, shape)"""
    + BLOCK_OF_CHANNEL
    + """
    offset = Gather<axis = 2>(offsets, which)
    Y = Add(scaled, offset)
}}""",
}

# name -> functions that its body calls.
_CALLS = {DEQUANTIZE: (UNPACK,), DEQUANTIZE_OFFSET: (DEQUANTIZE, UNPACK)} | integer_functions.CALLS

_IDENTITY = """
<domain: "kbitc", opset_import: ["" : {opset}]>
DynamicQuantize <axis, after, block> (X) => (Y) {{
    Y = Identity(X)
}}"""


def add_functions(model: ir.Model, names: Iterable[str], opset: int) -> None:
    """Put the named functions into the model, once each, and import their domain.

    Args:
        model: changed in place.
        names: function names of this domain; those that call others bring them along.
        opset: ONNX operator set version of the bodies.
    """
    bodies = _BODIES | integer_functions.BODIES | integer_nonlinear.BODIES | integer_reduce.BODIES
    wanted = set(names)
    for name in tuple(wanted):
        wanted.update(_CALLS.get(name, ()))
    for name in sorted(wanted):
        text = bodies[name].format(opset=opset, tiny=MIN_AMAX, limit=ACTIVATION_LIMIT)
        proto = onnx.parser.parse_function(text)
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    if wanted:
        model.opset_imports[DOMAIN] = 1


def inline_plain(model: ir.Model) -> ir.Model:
    """Put the bodies of those functions in place that have no kernel of their own; changes the model.

    They are the ones of `integer_reduce` and IntegerExp: few numbers, computed by standard integer operators.
    """
    if not any(node.domain == DOMAIN and node.op_type in PLAIN for node in model.graph):
        return model
    InlinePass(criteria=lambda function: function.domain == DOMAIN and function.name in PLAIN)(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_shapes(model)
    return model


def rounds_floats(model: ir.Model) -> bool:
    """Whether a QuantizeLinear depends on float arithmetic, whose last bits may differ between two machines."""
    tainted: set[ir.Value] = set()
    for node in model.graph:
        behind = any(value in tainted for value in node.inputs if value is not None)
        if node.op_type == "QuantizeLinear" and behind:
            return True
        quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        computes = any(value is not None and value.dtype == ir.DataType.FLOAT for value in node.inputs)
        if behind or (computes and not quantizes):
            tainted.update(node.outputs)
    return False


def without_rounding(model: ir.Model) -> ir.Model | None:
    """A copy in which DynamicQuantize gives back what it takes; None when the model does not quantize at run time.

    It shares the weights. It tells what the rounding of activations costs.
    """
    found = [key for key in model.functions if key[:2] == (DOMAIN, DYNAMIC_QUANTIZE)]
    if not found:
        return None
    copy = model.clone()
    for key in found:
        opset = model.functions[key].opset_imports[""]
        proto = onnx.parser.parse_function(_IDENTITY.format(opset=opset))
        copy.functions[key] = ir.serde.deserialize_function(proto)
    return copy
