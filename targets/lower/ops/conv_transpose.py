"""ConvTranspose: as a matrix product where windows do not overlap, otherwise as plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import te, tirx

from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.broadcast import elementwise
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, Dim
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.offer import find_tail, finish, offer, unique_name
from kbitc.targets.lower.ops.convolution import to_channels_first, to_channels_last
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Index, Value


@dataclass(frozen=True)
class Spread:
    """How a transposed convolution spreads its input, one entry a spatial dimension.

    Attributes:
        kernel, strides, dilations: in pixels.
        before: pixels cut from the low end of the result.
        out: spatial dimensions of the result.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Dim, ...]
    out: tuple[Dim, ...]


def read_spread(node: ir.Node, sizes: Sequence[Dim], kernel: Sequence[int]) -> Spread:
    """The geometry of a ConvTranspose node."""
    rank = len(sizes)

    def ints(name: str, default: list[int]) -> list[int]:
        given = node.attributes.get_ints(name)
        return default if given is None else [int(item) for item in given]

    strides, dilations = ints("strides", [1] * rank), ints("dilations", [1] * rank)
    extra, pads = ints("output_padding", [0] * rank), ints("pads", [0] * (2 * rank))
    wanted = node.attributes.get_ints("output_shape")
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    before: list[Dim] = []
    out: list[Dim] = []
    for axis, size in enumerate(sizes):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        full = dims.simplify((size - 1) * strides[axis] + span + extra[axis])
        if wanted is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
            low, high = (0, 0) if mode == "VALID" else (pads[axis], pads[axis + rank])
            before.append(low)
            out.append(dims.simplify(full - low - high))
            continue
        target = int(wanted[axis - rank]) if wanted is not None else dims.product([size, strides[axis]])
        total = dims.maximum(0, dims.simplify(full - target))
        half = dims.floor_divide(total, 2)
        before.append(dims.simplify(total - half) if mode == "SAME_LOWER" else half)
        out.append(target)
    return Spread(tuple(kernel), tuple(strides), tuple(dilations), tuple(before), tuple(out))


def conv_transpose(channels_last: bool) -> Callable[[Context, ir.Node], Value | None]:
    """An emitter for ConvTranspose, or for kbitc.core::ConvTransposeNHWC."""

    def emit(ctx: Context, node: ir.Node) -> Value | None:
        x, w = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
        bias = attributes.optional(ctx, node, 2)
        shape = attributes.static_shape(node, w.shape, "the weight")
        group = node.attributes.get_int("group", 1)
        channels = x.shape[-1] if channels_last else x.shape[1]
        if group < 1 or shape[0] % group or (dims.is_static(channels) and channels != shape[0]):
            got = f"{channels} channels, weight {list(shape)}, group {group}"
            raise refuse(node, "channels do not fit the weight", got=got, remedy="repair the model")
        sizes = x.shape[1:-1] if channels_last else x.shape[2:]
        spread = read_spread(node, sizes, shape[2:])
        if _is_product(x, w, bias, spread, sizes, group):
            return _as_product(ctx, node, x, w, bias, spread, channels_last)
        first = to_channels_first(ctx, x) if channels_last else x
        result = _plain(ctx, node, first, w, bias, spread)
        return to_channels_last(ctx, result) if channels_last else result

    return emit


def _is_product(x: Value, w: Value, bias: Value | None, spread: Spread, sizes: Sequence[Dim], group: int) -> bool:
    """Whether every output pixel has one input pixel, so that the operator is a product and a rearrangement."""
    exact = all(
        dims.equal(out, dims.product([size, stride]))
        for out, size, stride in zip(spread.out, sizes, spread.strides, strict=True)
    )
    constants = isinstance(w, Constant) and w.dtype == "float32" and (bias is None or isinstance(bias, Constant))
    return (
        constants
        and exact
        and x.dtype == "float32"
        and group == 1
        and len(spread.kernel) == 2
        and spread.kernel == spread.strides
        and set(spread.dilations) == {1}
        and all(isinstance(low, int) and low == 0 for low in spread.before)
    )


def _as_product(
    ctx: Context, node: ir.Node, x: Value, w: Value, bias: Value | None, spread: Spread, channels_last: bool
) -> Value:
    """x [B, H, W, C] @ w [C, KH * KW * M], then [B, H, W, KH, KW, M] -> [B, H, KH, W, KW, M]."""
    last = x if channels_last else to_channels_last(ctx, x)
    weight = np.asarray(w.array if isinstance(w, Constant) else 0, np.float32)
    channels, outputs, height, width = weight.shape
    view = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, 1, channels)
    vector = np.asarray(bias.array, np.float32).reshape(-1) if isinstance(bias, Constant) else None
    tail = find_tail(node, vector, outputs, 3 if channels_last else 1, 4)
    contraction = Contraction(
        name=unique_name(ctx, node),
        kind="matmul",
        weight=view,
        activation="float32",
        x_shape=tuple(last.shape),
        out_shape=(*last.shape[:-1], view.shape[0]),
        bias=None if tail.bias is None else np.tile(tail.bias, height * width),
        post=tail.post,
    )
    finish(ctx, tail)
    found: Value = offer(ctx, node, contraction, [ctx.var(last, "operand")])
    batch, rows, columns, _ = last.shape
    found = ctx.reshape(found, (batch, rows, columns, height, width, outputs))
    moved = ctx.tensor(transposed(ctx, found, [0, 1, 3, 2, 4, 5]), "spread")
    image = ctx.reshape(moved, (batch, *spread.out, outputs))
    result = image if channels_last else to_channels_first(ctx, image)
    ctx.bind(tail.output, result)
    return result


def _plain(ctx: Context, node: ir.Node, x: Value, w: Value, bias: Value | None, spread: Spread) -> Value:
    """Every output pixel sums the input pixels that reach it; channels first."""
    shape = attributes.static_shape(node, w.shape, "the weight")
    group = node.attributes.get_int("group", 1)
    per_group, outputs = shape[0] // group, shape[1]
    wide = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    source, weights = ctx.lazy(ctx.tensor(x)), ctx.lazy(ctx.tensor(w))
    out_shape = (x.shape[0], outputs * group, *spread.out)

    def build(te_group: Group) -> list[TeTensor]:
        c = te.reduce_axis((0, per_group), "c")
        taps = [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(spread.kernel)]

        def element(indices: Sequence[Index]) -> Any:
            image, m, *out = indices
            places, conditions = _sources(spread, x.shape[2:], out, [tap.var for tap in taps])
            channel = c.var if group == 1 else tirx.floordiv(m, outputs) * per_group + c.var
            value = scalar.cast(source.element(te_group, [image, channel, *places]), wide)
            value = tirx.if_then_else(tirx.all(*conditions), value, tirx.const(0, wide))
            own = m if group == 1 else tirx.floormod(m, outputs)
            factor = scalar.cast(weights.element(te_group, [channel, own, *(tap.var for tap in taps)]), wide)
            return te.sum(value * factor, axis=[c, *taps])

        return [compute(out_shape, element, "conv_transpose")]

    result: Value = ctx.kernel("conv_transpose", [(out_shape, wide)], build, kind="reduce")[0]
    if bias is not None:
        column = ctx.reshape(bias, (1, outputs * group, *(1 for _ in spread.out)))
        result = elementwise(ctx, node, [result, column], lambda a, b: a + scalar.cast(b, wide))
    return result if wide == x.dtype else elementwise(ctx, node, [result], lambda a: scalar.cast(a, x.dtype), x.dtype)


def _sources(
    spread: Spread, sizes: Sequence[Dim], out: Sequence[Index], taps: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Input position of a tap for an output pixel, and the conditions under which there is one."""
    places, conditions = [], []
    for axis, (o, k) in enumerate(zip(out, taps, strict=True)):
        shifted = o + spread.before[axis] - k * spread.dilations[axis]
        stride = spread.strides[axis]
        place = shifted if stride == 1 else tirx.floordiv(shifted, stride)
        if stride != 1:
            conditions.append(tirx.floormod(shifted, stride) == 0)
        conditions.extend((place >= 0, place < dims.expression(sizes[axis])))
        places.append(place)
    return places, conditions


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"ConvTranspose": conv_transpose(False)}
CORE_TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"ConvTransposeNHWC": conv_transpose(True)}
