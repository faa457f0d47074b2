"""Convolutions: one- and two-dimensional ones of constant weights become contractions, all others plain loops.

Contractions work on channels-last tensors. `Conv` of the default domain reads and writes channels-first, so its
operands are transposed; `kbitc.core::ConvNHWC` (and its one-dimensional form) is already channels-last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import te, tirx

from kbitc.graph import ops as graph_ops
from kbitc.graph.quantized import read_weight
from kbitc.quant.tensor import QTensor
from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, Dim
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.offer import find_tail, finish, offer, unique_name
from kbitc.targets.lower.ops.contraction import quantized_activation
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.ops.padding import padded
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Index, Value
from kbitc.targets.lower.windows import Window, all_of, read_window

FloatArray = npt.NDArray[np.float32]


def to_channels_last(ctx: Context, x: Value) -> Value:
    """[N, C, *spatial] -> [N, *spatial, C]."""
    rank = len(x.shape)
    return transposed(ctx, x, [0, *range(2, rank), 1])


def to_channels_first(ctx: Context, x: Value) -> Value:
    """[N, *spatial, C] -> [N, C, *spatial]."""
    rank = len(x.shape)
    return transposed(ctx, x, [0, rank - 1, *range(1, rank - 1)])


def conv(ctx: Context, node: ir.Node) -> Value | None:
    """Conv with channels first."""
    return _conv(ctx, node, channels_last=False)


def conv_nhwc(ctx: Context, node: ir.Node) -> Value | None:
    """kbitc.core::ConvNHWC: channels last; the weight keeps its ONNX layout [N, C/group, *kernel]."""
    return _conv(ctx, node, channels_last=True)


def _conv(ctx: Context, node: ir.Node, channels_last: bool) -> Value | None:
    weight: QTensor | FloatArray | None = read_weight(node.inputs[1], "conv")
    kernel = kernel_of(ctx, node)
    bias = attributes.optional(ctx, node, 2)
    x, block = _activation(ctx, node, weight, channels_last, len(kernel))
    group = node.attributes.get_int("group", 1)
    if weight is None:
        weight = _float_weight(ctx, node, x, len(kernel))
    fixed_bias = bias is None or (isinstance(bias, Constant) and bias.dtype == "float32")
    if weight is None or len(kernel) > 2 or not fixed_bias:
        first = to_channels_first(ctx, x) if channels_last else x
        result = plain_conv(ctx, node, first, attributes.value(ctx, node, 1), bias)
        return to_channels_last(ctx, result) if channels_last else result
    vector = np.asarray(bias.array, np.float32).reshape(-1) if isinstance(bias, Constant) else None
    last = x if channels_last else to_channels_last(ctx, x)
    check_channels(node, last.shape[-1], weight.shape, group)
    return _contract(ctx, node, last, weight, kernel, vector, block, channels_last)


def _activation(
    ctx: Context, node: ir.Node, weight: QTensor | FloatArray | None, channels_last: bool, spatial: int
) -> tuple[Value, int | None]:
    """The activations, and the block of their run-time quantization (None: they stay float)."""
    if isinstance(weight, QTensor) and node.attributes.get_int("group", 1) == 1:
        found = quantized_activation(node, 0, spatial + 1 if channels_last else 1, weight)
        if found is not None:
            return ctx.get(found[0]), found[1]
    return attributes.value(ctx, node, 0), None


def kernel_of(ctx: Context, node: ir.Node) -> tuple[int, ...]:
    """The spatial dimensions of the weight."""
    given = node.attributes.get_ints("kernel_shape")
    source = node.inputs[1]
    if given is None and source is not None and source.shape is not None and source.shape.is_static():
        given = source.shape.numpy()[2:]
    if given is None:
        given = attributes.static_shape(node, attributes.value(ctx, node, 1).shape[2:], "the kernel")
    return tuple(int(item) for item in given)


def _float_weight(ctx: Context, node: ir.Node, x: Value, spatial: int) -> FloatArray | None:
    if x.dtype != "float32" or spatial not in (1, 2):
        return None
    value = attributes.value(ctx, node, 1)
    if not isinstance(value, Constant) or value.dtype != "float32":
        return None
    return np.asarray(graph_ops.to_view(value.array, "conv"), np.float32)


def check_channels(node: ir.Node, channels: Dim, weight: Sequence[int], group: int) -> None:
    """Refuse a weight [N, T, C] that does not fit the input channels and the groups."""
    if group < 1 or weight[0] % group or (dims.is_static(channels) and channels != weight[2] * group):
        got = f"{channels} input channels, weight {weight[0]} x {weight[2]}, group {group}"
        raise refuse(node, "channels do not fit the weight", got=got, remedy="repair the model")


def _contract(
    ctx: Context,
    node: ir.Node,
    x: Value,
    weight: QTensor | FloatArray,
    kernel: tuple[int, ...],
    bias: FloatArray | None,
    block: int | None,
    channels_last: bool,
) -> Value:
    """A one- or two-dimensional convolution of channels-last x by a constant weight."""
    group = node.attributes.get_int("group", 1)
    n = weight.shape[0]
    x = ctx.cast_shape(x, (*x.shape[:-1], weight.shape[2] * group))
    window = read_window(node, x.shape[1:-1], kernel)
    if not all(isinstance(pad, int) and pad >= 0 for pad in (*window.before, *window.after)):
        x, window = _pad_first(ctx, node, x, window)
    flat = len(kernel) == 1
    image = ctx.reshape(x, (x.shape[0], 1, *x.shape[1:])) if flat else x
    out_shape = (x.shape[0], *((1,) if flat else ()), *window.out, n)
    rank = len(x.shape)
    tail = find_tail(node, bias, n, rank - 1 if channels_last else 1, rank)
    contraction = Contraction(
        name=unique_name(ctx, node),
        kind="conv",
        weight=weight,
        activation="float32" if block is None else "int8",
        x_shape=tuple(image.shape),
        out_shape=out_shape,
        activation_block=block or 0,
        conv=geometry(window, group),
        bias=tail.bias,
        post=tail.post,
        accumulators_out=ctx.debug_accumulators and block is not None,
    )
    finish(ctx, tail)
    found: Value = offer(ctx, node, contraction, [ctx.var(image, "operand")])
    found = ctx.reshape(found, (x.shape[0], *window.out, n))
    result = found if channels_last else to_channels_first(ctx, found)
    ctx.bind(tail.output, result)
    return result


def geometry(window: Window, group: int) -> ConvAttributes:
    """The two-dimensional form of a window of one or two dimensions."""
    one = len(window.kernel) == 1
    before, after = (tuple(int(pad) for pad in pads) for pads in (window.before, window.after))
    if one:
        return ConvAttributes(
            (1, window.kernel[0]), (1, window.strides[0]), (0, before[0], 0, after[0]), (1, window.dilations[0]), group
        )
    pairs = [(int(a), int(b)) for a, b in (window.kernel, window.strides, window.dilations)]
    return ConvAttributes(pairs[0], pairs[1], (before[0], before[1], after[0], after[1]), pairs[2], group)


def _pad_first(ctx: Context, node: ir.Node, x: Value, window: Window) -> tuple[Value, Window]:
    """Padding that depends on symbolic dimensions, or crops, becomes an operation of its own."""
    zero = Constant(np.zeros((), np.float32), "float32")
    grown = padded(ctx, node, x, [0, *window.before, 0], [0, *window.after, 0], "constant", zero)
    none = (0,) * len(window.kernel)
    return grown, Window(
        window.kernel, window.strides, window.dilations, none, none, tuple(grown.shape[1:-1]), window.out
    )


def plain_conv(ctx: Context, node: ir.Node, x: Value, w: Value, bias: Value | None) -> Value:
    """Any convolution as plain loops over channels-first tensors; 16-bit floats are summed in float32."""
    group = node.attributes.get_int("group", 1)
    shape = attributes.static_shape(node, w.shape, "the weight")
    check_channels(node, x.shape[1], (shape[0], 1, shape[1]), group)
    window = read_window(node, x.shape[2:], shape[2:])
    wide = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    source, weights = ctx.lazy(ctx.tensor(x)), ctx.lazy(ctx.tensor(w))
    per_group, channels = shape[0] // group, shape[1]
    out_shape = (x.shape[0], shape[0], *window.out)

    def build(te_group: Group) -> list[TeTensor]:
        c = te.reduce_axis((0, channels), "c")
        taps = [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(shape[2:])]

        def element(indices: Sequence[Index]) -> Any:
            image, n, *out = indices
            places = window.positions(out, [tap.var for tap in taps])
            channel = c.var if group == 1 else tirx.floordiv(n, per_group) * channels + c.var
            value = scalar.cast(source.element(te_group, [image, channel, *places]), wide)
            inside = all_of(window.inside(places))
            if inside is not None:
                value = tirx.if_then_else(inside, value, tirx.const(0, wide))
            factor = scalar.cast(weights.element(te_group, [n, c.var, *(tap.var for tap in taps)]), wide)
            return te.sum(value * factor, axis=[c, *taps])

        return [compute(out_shape, element, "conv")]

    result: Value = ctx.kernel("conv", [(out_shape, wide)], build, kind="reduce")[0]
    if bias is not None:
        column = ctx.reshape(bias, (1, shape[0], *(1 for _ in window.out)))
        result = elementwise(ctx, node, [result, column], lambda a, b: a + scalar.cast(b, wide))
    return result if wide == x.dtype else elementwise(ctx, node, [result], lambda a: scalar.cast(a, x.dtype), x.dtype)


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Conv": conv}
CORE_TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"ConvNHWC": conv_nhwc}
