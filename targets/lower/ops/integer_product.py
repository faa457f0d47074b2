"""Contractions of integer graphs: ConvInteger and MatMulInteger with the bias and requantization behind them.

Before: Requantize(Add(ConvInteger(x, w, x_zero), bias), multiplier, shift, zero)
After: one `Contraction` of uint8 codes with an integer epilogue, offered to the kernel rules of the target.
Keeps the standard form, in plain loops, when x is not uint8, a zero point is not one constant number, or the levels
of a constant w do not fit int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import tirx

from kbitc.graph import edit
from kbitc.graph.integer_functions import REQUANTIZE
from kbitc.graph.levels import read_levels
from kbitc.quant.levels import LevelTensor
from kbitc.targets.lower import attributes, dims, dtypes
from kbitc.targets.lower.broadcast import elementwise, result_shape
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, Dim, Requantization
from kbitc.targets.lower.offer import channel_vector, offer, unique_name
from kbitc.targets.lower.ops.contraction import product
from kbitc.targets.lower.ops.convolution import (
    check_channels,
    geometry,
    kernel_of,
    plain_conv,
    to_channels_first,
    to_channels_last,
)
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.ops.padding import padded
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Value
from kbitc.targets.lower.windows import Window, read_window

IntArray = npt.NDArray[np.int32]
Emit = Callable[[Context, ir.Node], Any]
FUNCTIONS = "kbitc"


@dataclass(frozen=True)
class IntegerTail:
    """What follows an integer product and goes into its kernel.

    Attributes:
        bias: int32 [N] or None.
        requantize: or None.
        output: the graph value that the kernel then computes.
        nodes: the fused nodes.
    """

    bias: IntArray | None
    requantize: Requantization | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def find_integer_tail(node: ir.Node, n: Dim, axis: int, rank: int) -> IntegerTail:
    """The bias and requantization behind an integer product whose result nobody else reads.

    Args:
        node: the product.
        n: output channels.
        axis: axis of the output channels in the node's output.
        rank: rank of that output.
    """
    output, nodes, bias, numbers = node.outputs[0], [], None, None
    user = edit.only_use(output)
    if user is not None and edit.is_op(user, "Add") and isinstance(n, int):
        bias = channel_vector(user, output, n, axis, rank, np.int32)
        if bias is not None:
            nodes.append(user)
            output = user.outputs[0]
            user = edit.only_use(output)
    if user is not None and user.domain == FUNCTIONS and user.op_type == REQUANTIZE:
        numbers = requantization(user)
        same_axis = user.attributes.get_int("axis", 0) == axis
        if numbers is not None and (same_axis or numbers.multiplier.size == numbers.shift.size == 1):
            nodes.append(user)
            output = user.outputs[0]
        else:
            numbers = None
    return IntegerTail(bias, numbers, output, tuple(nodes))


def requantization(node: ir.Node) -> Requantization | None:
    """The numbers of a kbitc::Requantize; None when they are not constants."""
    arrays = [edit.constant(value) for value in node.inputs[1:4]]
    if len(arrays) != 3 or any(array is None for array in arrays):
        return None
    multiplier, shift, zero = (np.asarray(array, np.int32).reshape(-1) for array in arrays)
    low, high = node.attributes.get_int("low", 0), node.attributes.get_int("high", 255)
    return Requantization(multiplier, shift, int(zero[0]), low, high)


def zero_point(node: ir.Node, index: int) -> int | None:
    """An optional zero point as one number, 0 when it is left out; None when it is not one constant number."""
    value = attributes.present(node, index)
    if value is None:
        return 0
    array = edit.constant(value)
    return None if array is None or array.size != 1 else int(array.reshape(-1)[0])


def _contract(ctx: Context, tail: IntegerTail, node: ir.Node, inputs: Sequence[Value], **fields: Any) -> Value:
    """Offer the contraction that the fields and the tail describe."""
    contraction = Contraction(
        name=unique_name(ctx, node),
        activation="uint8",
        x_shape=tuple(inputs[0].shape),
        bias=tail.bias,
        requantize=tail.requantize,
        accumulators_out=ctx.debug_accumulators and tail.requantize is not None,
        **fields,
    )
    ctx.skipped.update(tail.nodes)
    return offer(ctx, node, contraction, [ctx.var(value, "operand") for value in inputs])


def matmul_integer(ctx: Context, node: ir.Node) -> Value | None:
    """MatMulInteger: by constant levels, or of two activations."""
    a_zero, b_zero = zero_point(node, 2), zero_point(node, 3)
    a = attributes.value(ctx, node, 0)
    levels = read_levels(node.inputs[1], "matmul", attributes.present(node, 3))
    if a.dtype != "uint8" or a_zero is None or len(a.shape) < 2:
        return _plain_matmul(ctx, node)
    if levels is not None:
        return _matmul_by_levels(ctx, node, a, levels, a_zero)
    b = attributes.value(ctx, node, 1)
    if b.dtype != "uint8" or b_zero is None or len(b.shape) < 2:
        return _plain_matmul(ctx, node)
    return _matmul_of_codes(ctx, node, a, (a_zero, b_zero))


def _matmul_by_levels(ctx: Context, node: ir.Node, a: Value, weight: LevelTensor, zero: int) -> Value:
    n, _, channels = weight.shape
    a = ctx.cast_shape(a, (*a.shape[:-1], channels))
    rank = len(a.shape)
    tail = find_integer_tail(node, n, rank - 1, rank)
    shape = (*a.shape[:-1], n)
    result = _contract(ctx, tail, node, [a], kind="matmul", weight=weight, out_shape=shape, x_zero=zero)
    ctx.bind(tail.output, result)
    return result


def _matmul_of_codes(ctx: Context, node: ir.Node, a: Value, zeros: tuple[int, int]) -> Value:
    """Two activations; a Transpose that only swaps the last two axes of the second one is read as it lies."""
    b, swapped = _second_operand(ctx, node)
    rows, columns = (b.shape[-1], b.shape[-2]) if swapped else (b.shape[-2], b.shape[-1])
    if dims.never_equal(a.shape[-1], rows):
        got = f"{dims.text(a.shape)} by {dims.text(b.shape)}"
        raise refuse(node, "inner dimensions differ", got=got, remedy="repair the model")
    inner = (columns, a.shape[-1]) if swapped else (a.shape[-1], columns)
    b = ctx.cast_shape(b, (*b.shape[:-2], *inner))
    lead = result_shape(node, [a.shape[:-2], b.shape[:-2]]) if len(a.shape) + len(b.shape) > 4 else ()
    shape = (*lead, a.shape[-2], columns)
    tail = find_integer_tail(node, columns, len(shape) - 1, len(shape))
    if tail.bias is not None or (tail.requantize is not None and tail.requantize.multiplier.size > 1):
        tail = IntegerTail(None, None, node.outputs[0], ())
    result = _contract(
        ctx, tail, node, [a, b], kind="batch_matmul", weight=None, out_shape=shape, b_shape=tuple(b.shape),
        transpose_b=swapped, x_zero=zeros[0], b_zero=zeros[1],
    )  # fmt: skip
    ctx.bind(tail.output, result)
    return result


def _second_operand(ctx: Context, node: ir.Node) -> tuple[Value, bool]:
    """The second operand, and whether its last two axes are swapped."""
    source = node.inputs[1]
    turn = None if source is None else edit.producer(source, "Transpose")
    if turn is not None and source is not None and source.shape is not None:
        size = len(source.shape)
        perm = list(turn.attributes.get_ints("perm", list(range(size))[::-1]))
        swapped = [*perm[:-2], perm[-1], perm[-2]]
        # The axis that lies together in memory becomes the last one: whole runs are moved, or nothing at all.
        if swapped[-1] == size - 1:
            return transposed(ctx, attributes.value(ctx, turn, 0), swapped), True
    return attributes.value(ctx, node, 1), False


def _plain_matmul(ctx: Context, node: ir.Node) -> Value:
    """(A - a_zero) @ (B - b_zero) in int32, for any types; a_zero a row, b_zero a column."""
    a, b = (_shifted_matrix(ctx, node, index, index + 2, row=index == 0) for index in (0, 1))
    return product(ctx, node, a, b)


def _shifted_matrix(ctx: Context, node: ir.Node, index: int, zero_index: int, row: bool) -> Value:
    x, zero = attributes.value(ctx, node, index), attributes.optional(ctx, node, zero_index)
    if not dtypes.is_integer(x.dtype):
        raise refuse(node, "operands must be integers", got=x.dtype, remedy="repair the model")
    if zero is not None and row and len(zero.shape) == 1 and not (dims.is_static(zero.shape[0]) and zero.shape[0] == 1):
        zero = ctx.reshape(zero, (*zero.shape, 1))
    return _shifted(ctx, node, x, zero)


def _shifted(ctx: Context, node: ir.Node, x: Value, zero: Value | None) -> Value:
    """x - zero in int32."""
    if zero is None:
        return elementwise(ctx, node, [x], lambda v: tirx.Cast("int32", v), "int32")
    return elementwise(ctx, node, [x, zero], lambda v, z: tirx.Cast("int32", v) - tirx.Cast("int32", z), "int32", 3)


def conv_integer(channels_last: bool) -> Emit:
    """An emitter for ConvInteger; channels last is kbitc.core::ConvIntegerNHWC, whose weight keeps its ONNX layout."""

    def emit(ctx: Context, node: ir.Node) -> Value | None:
        zero, kernel = zero_point(node, 2), kernel_of(ctx, node)
        x = attributes.value(ctx, node, 0)
        weight = read_levels(node.inputs[1], "conv", attributes.present(node, 3))
        if x.dtype != "uint8" or zero is None or weight is None or len(kernel) not in (1, 2):
            first = to_channels_first(ctx, x) if channels_last else x
            result = _plain_conv(ctx, node, first)
            return to_channels_last(ctx, result) if channels_last else result
        return _conv_by_levels(ctx, node, x, weight, zero, kernel, channels_last)

    return emit


def _conv_by_levels(
    ctx: Context, node: ir.Node, x: Value, weight: LevelTensor, zero: int, kernel: tuple[int, ...], channels_last: bool
) -> Value:
    group, n = node.attributes.get_int("group", 1), weight.shape[0]
    x = x if channels_last else to_channels_last(ctx, x)
    check_channels(node, x.shape[-1], weight.shape, group)
    x = ctx.cast_shape(x, (*x.shape[:-1], weight.shape[2] * group))
    window = read_window(node, x.shape[1:-1], kernel)
    if not all(isinstance(pad, int) and pad >= 0 for pad in (*window.before, *window.after)):
        x, window = _padded_first(ctx, node, x, window, zero)
    flat = len(kernel) == 1
    image = ctx.reshape(x, (x.shape[0], 1, *x.shape[1:])) if flat else x
    rank = len(x.shape)
    tail = find_integer_tail(node, n, rank - 1 if channels_last else 1, rank)
    shape = (x.shape[0], *((1,) if flat else ()), *window.out, n)
    conv: ConvAttributes = geometry(window, group)
    found = _contract(ctx, tail, node, [image], kind="conv", weight=weight, out_shape=shape, conv=conv, x_zero=zero)
    found = ctx.reshape(found, (x.shape[0], *window.out, n))
    result = found if channels_last else to_channels_first(ctx, found)
    ctx.bind(tail.output, result)
    return result


def _padded_first(ctx: Context, node: ir.Node, x: Value, window: Window, zero: int) -> tuple[Value, Window]:
    """Padding that depends on symbolic dimensions, or crops, becomes an operation of its own."""
    code = Constant(np.asarray(zero, np.uint8), "uint8")
    grown = padded(ctx, node, x, [0, *window.before, 0], [0, *window.after, 0], "constant", code)
    none = (0,) * len(window.kernel)
    sizes = tuple(grown.shape[1:-1])
    return grown, Window(window.kernel, window.strides, window.dilations, none, none, sizes, window.out)


def _plain_conv(ctx: Context, node: ir.Node, x: Value) -> Value:
    """(x - x_zero) * (w - w_zero) in int32 for any types; padding counts as the zero point."""
    w, x_zero, w_zero = attributes.value(ctx, node, 1), *(attributes.optional(ctx, node, i) for i in (2, 3))
    if w_zero is not None and len(w_zero.shape) == 1:
        w_zero = ctx.reshape(w_zero, (*w_zero.shape, *(1 for _ in w.shape[1:])))
    return plain_conv(ctx, node, _shifted(ctx, node, x, x_zero), _shifted(ctx, node, w, w_zero), None)


TABLE: dict[str, Emit] = {"MatMulInteger": matmul_integer, "ConvInteger": conv_integer(False)}
CORE_TABLE: dict[str, Emit] = {"ConvIntegerNHWC": conv_integer(True)}
