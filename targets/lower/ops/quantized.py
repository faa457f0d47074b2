"""Quantization operators outside of contractions: QuantizeLinear, DequantizeLinear and the functions of kbitc.

A kernel reads quantized weights and activations behind these nodes; they are emitted only for other readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from kbitc.graph import functions
from kbitc.quant.packing import unpack_dense
from kbitc.targets.lower import attributes, dims, dtypes, scalar
from kbitc.targets.lower.attributes import axis_of
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.group import Group, TeTensor, compute, named
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.ops.reduce import reduced
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Tensor, Value

Emit = Callable[[Context, ir.Node], Any]


def _parameter(
    ctx: Context, node: ir.Node, value: Value | None, x: Value
) -> Callable[[Group, Sequence[Index]], Expr] | None:
    """A scale or zero point of every element of x: per tensor, along an axis, or in blocks along it."""
    if value is None:
        return None
    lazy = ctx.lazy(value if isinstance(value, Constant) else ctx.tensor(value))
    rank = len(x.shape)
    if len(lazy.shape) == 0:
        return lambda group, indices: lazy.element(group, ())
    axis = axis_of(node, node.attributes.get_int("axis", 1), rank) if rank else 0
    block = node.attributes.get_int("block_size", 0)
    if len(lazy.shape) == 1 and block == 0:
        if dims.is_static(lazy.shape[0]) and lazy.shape[0] == 1:
            zero = tirx.IntImm("int64", 0)
            return lambda group, indices: lazy.element(group, (zero,))
        return lambda group, indices: lazy.element(group, (indices[axis],))
    if len(lazy.shape) != rank or block < 1:
        raise refuse(node, "the scale does not fit the tensor", got=f"{dims.text(lazy.shape)} for {dims.text(x.shape)}")

    def blocked(group: Group, indices: Sequence[Index]) -> Expr:
        place = [*indices[:axis], tirx.floordiv(indices[axis], block), *indices[axis + 1 :]]
        return lazy.element(group, place)

    return blocked


def dequantize_linear(ctx: Context, node: ir.Node) -> Value:
    """(x - zero point) * scale, in the type of the scale."""
    x, scale = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    zero = attributes.optional(ctx, node, 2)
    if isinstance(x, Constant) and isinstance(scale, Constant) and (zero is None or isinstance(zero, Constant)):
        return _dequantize_constant(node, x, scale, zero)
    factor, offset = _parameter(ctx, node, scale, x), _parameter(ctx, node, zero, x)
    source = ctx.lazy(x)
    to = node.attributes.get_int("output_dtype", 0)
    dtype = dtypes.tvm_type(ir.DataType(to), node.name or "DequantizeLinear") if to else scale.dtype

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        value = tirx.Cast("int32", source.element(group, indices))
        if offset is not None:
            value = value - tirx.Cast("int32", offset(group, indices))
        wide = tirx.Cast("float32", value)
        if factor is not None:
            wide = wide * scalar.cast(factor(group, indices), "float32")
        return scalar.cast(wide, dtype)

    return Lazy(element, x.shape, dtype, source.cost + 4, source.pointwise)


def _dequantize_constant(node: ir.Node, x: Constant, scale: Constant, zero: Constant | None) -> Constant:
    """The same for a constant, while compiling."""
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def spread(array: Any) -> Any:
        if array.size == 1:
            return array.reshape(())
        place = axis_of(node, axis, x.array.ndim)
        if array.ndim == 1 and block == 0:
            return array.reshape([-1 if i == place else 1 for i in range(x.array.ndim)])
        wide = np.repeat(array, block, axis=place)
        return np.take(wide, np.arange(x.array.shape[place]), axis=place)

    values = x.array.astype(np.int32)
    if zero is not None:
        values = values - spread(zero.array.astype(np.int32))
    result = values.astype(np.float32) * spread(scale.array.astype(np.float32))
    return Constant(np.asarray(result, dtypes.numpy_type(scale.dtype)), scale.dtype, node.outputs[0].name or "")


def quantize_linear(ctx: Context, node: ir.Node) -> Value:
    """saturate(round half to even(x / scale) + zero point)."""
    x, scale = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    zero = attributes.optional(ctx, node, 2)
    dtype = zero.dtype if zero is not None else _output_type(node)
    if dtype not in dtypes.INTEGER_RANGE:
        raise refuse(node, "quantization to this type cannot be compiled", got=dtype)
    low, high = dtypes.INTEGER_RANGE[dtype]
    factor, offset = _parameter(ctx, node, scale, x), _parameter(ctx, node, zero, x)
    source = ctx.lazy(x)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        value = scalar.cast(source.element(group, indices), "float32")
        if factor is not None:
            value = value / scalar.cast(factor(group, indices), "float32")
        zero_point = None if offset is None else tirx.Cast("int32", offset(group, indices))
        return scalar.rounded_code(value, zero_point, dtypes.storage(dtype), low, high)

    return Lazy(element, x.shape, dtype, source.cost + 8, source.pointwise)


def _output_type(node: ir.Node) -> str:
    to = node.attributes.get_int("output_dtype", 0)
    if not to:
        return "uint8"
    kind = ir.DataType(to)
    return dtypes.NARROW_TYPES.get(kind) or dtypes.tvm_type(kind, node.name or "QuantizeLinear")


def dynamic_quantize_linear(ctx: Context, node: ir.Node) -> list[Value]:
    """DynamicQuantizeLinear: uint8 with one scale and zero point for the whole tensor."""
    x = ctx.tensor(attributes.value(ctx, node, 0))
    axes = list(range(len(x.shape)))
    smallest, largest = (ctx.lazy(reduced(ctx, x, axes, kind, name=f"range_{kind}")) for kind in ("min", "max"))
    zero, top = tirx.const(0.0, "float32"), tirx.const(255.0, "float32")

    def scale_of(group: Group, indices: Sequence[Index]) -> Expr:
        high = tirx.max(largest.element(group, ()), zero)
        low = tirx.min(smallest.element(group, ()), zero)
        return named((high - low) / top, lambda s: tirx.Select(s == zero, tirx.const(1.0, "float32"), s))

    scale = ctx.tensor(Lazy(scale_of, (), "float32", 6))
    factor = ctx.lazy(scale)

    def zero_of(group: Group, indices: Sequence[Index]) -> Expr:
        low = tirx.min(smallest.element(group, ()), zero)
        return scalar.saturate(tirx.nearbyint(zero - low / factor.element(group, ())), "uint8", 0, 255)

    point = ctx.tensor(Lazy(zero_of, (), "uint8", 6))
    offset, source = ctx.lazy(point), ctx.lazy(x)

    def code(group: Group, indices: Sequence[Index]) -> Expr:
        value = tirx.nearbyint(source.element(group, indices) / factor.element(group, ()))
        return scalar.saturate(value + tirx.Cast("float32", offset.element(group, ())), "uint8", 0, 255)

    return [Lazy(code, x.shape, "uint8", 10), scale, point]


def dynamic_quantize(ctx: Context, node: ir.Node) -> Value:
    """kbitc::DynamicQuantize for a reader that is no integer kernel: the values that the int8 codes stand for."""
    source = attributes.value(ctx, node, 0)
    rank = len(source.shape)
    axis = axis_of(node, node.attributes.get_int("axis", rank - 1), rank)
    order = [*(i for i in range(rank) if i != axis), axis]
    x = ctx.tensor(transposed(ctx, source, order))
    channels = attributes.static_shape(node, x.shape[-1:], "the quantized axis")[0]
    block = node.attributes.get_int("block", 0) or channels
    result = _quantized_values(ctx, x, channels, min(block, channels))
    return transposed(ctx, result, [order.index(i) for i in range(rank)])


def _quantized_values(ctx: Context, x: Tensor, channels: int, block: int) -> Tensor:
    from kbitc.targets.reference.contraction import quantize_stages

    def build(group: Group) -> list[TeTensor]:
        codes, scales = quantize_stages(group, x.var, x.shape[:-1], channels, block)

        def value(indices: Sequence[Index]) -> Expr:
            scale = scales(*indices[:-1], tirx.floordiv(indices[-1], block))
            return tirx.Cast("float32", codes(*indices)) * scale

        return [compute(x.shape, value, "values")]

    return ctx.kernel("quantized_values", [(x.shape, "float32")], build, kind="general")[0]


def _constants(ctx: Context, node: ir.Node) -> list[Any]:
    arrays = []
    for index in range(len(node.inputs)):
        value = attributes.value(ctx, node, index)
        if not isinstance(value, Constant):
            raise refuse(node, "operands must be constants", remedy="quantize the model again")
        arrays.append(value.array)
    return arrays


def unpack_kbit(ctx: Context, node: ir.Node) -> Value:
    """kbitc::UnpackKBit of constants: a dense stream of codes -> int64 codes."""
    stream, shape = _constants(ctx, node)
    sizes = tuple(int(size) for size in shape)
    codes = unpack_dense(np.asarray(stream, np.uint8), node.attributes.get_int("bits", 8), prod(sizes))
    return Constant(codes.reshape(sizes).astype(np.int64), "int64", node.outputs[0].name or "")


def dequantize_kbit(ctx: Context, node: ir.Node) -> Value:
    """kbitc::DequantizeKBit of constants, scale * (grid[code] - zero), and the one that adds an offset."""
    stream, grid, scales, zeros, shape, *more = _constants(ctx, node)
    sizes = tuple(int(size) for size in shape)
    codes = unpack_dense(np.asarray(stream, np.uint8), node.attributes.get_int("bits", 8), prod(sizes)).reshape(sizes)
    which = np.arange(sizes[2]) // node.attributes.get_int("block", 1)
    levels = np.asarray(grid, np.float32)[codes]
    scale, zero, *offset = (np.take(np.asarray(array, np.float32), which, axis=2) for array in (scales, zeros, *more))
    values = (levels - zero) * scale
    for array in offset:
        values = values + array
    return Constant(np.asarray(values, np.float32), "float32", node.outputs[0].name or "")


TABLE: dict[str, Emit] = {
    "DequantizeLinear": dequantize_linear,
    "QuantizeLinear": quantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
}
FUNCTION_TABLE: dict[str, Emit] = {
    functions.DYNAMIC_QUANTIZE: dynamic_quantize,
    functions.UNPACK: unpack_kbit,
    functions.DEQUANTIZE: dequantize_kbit,
    functions.DEQUANTIZE_OFFSET: dequantize_kbit,
}
