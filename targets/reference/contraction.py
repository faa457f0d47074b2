"""The reference rule for contractions: plain TE loops over the packed layout. Slow, always right, for any target.

It is the oracle of the kernels and the last rule of every list. The float operations are those of
`kbitc.graph.functions`: for int8 activations

    out[m, n] = sum over (t, block), t first, of float(acc[m, t, block, n]) * (a_scale[m, block] * w_scale[n, t, block])

with acc[m, t, block, n] = sum over c in the block of code[m, c] * (grid[w] - grid[zero]) in int32. With offsets the
integer of a weight is its code, and each term is a sum: + (float(sum of code[m, c]) * a_scale[m, block]) * offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from tvm import te, tirx

from kbitc.errors import InternalError
from kbitc.quant.tensor import QTensor
from kbitc.targets.lower import dims
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, Dim, RelaxExpr
from kbitc.targets.lower.group import Group, TeTensor, compute, named
from kbitc.targets.lower.ops.indexing import inside
from kbitc.targets.lower.values import Constant, Expr, Index
from kbitc.targets.reference.integer import PlainIntegers
from kbitc.targets.reference.packed import PackedWeight, packed_weight
from kbitc.targets.target import Target

LEVEL = 127.0
SMALLEST = 1e-30


@dataclass(frozen=True)
class ReferenceContraction:
    """Takes every contraction."""

    name: str = "reference"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """Always None."""
        return None

    def emit(self, ctx: Context, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Emit plain loops."""
        if contraction.activation == "uint8":
            return PlainIntegers().emit(ctx, contraction, inputs)
        if contraction.kind == "batch_matmul":
            return _batch_matmul(ctx, contraction, inputs)
        if contraction.kind == "embedding":
            return _embedding(ctx, contraction, inputs[0])
        if contraction.activation == "int8":
            return _integer_product(ctx, contraction, inputs[0])
        return _float_product(ctx, contraction, inputs[0])


def _finish(contraction: Contraction, bias: RelaxExpr | None) -> Callable[[Group, Expr, Expr], Expr]:
    """(group, sum, n) -> the sum with bias and clamp."""

    def apply(group: Group, total: Expr, n: Expr) -> Expr:
        value = total if bias is None else total + group.read(bias, [n])
        post = contraction.post
        if post is None:
            return value

        def clamped(x: Expr) -> Expr:
            if post.low is not None:
                low = tirx.const(post.low, "float32")
                x = tirx.Select(x < low, low, x)
            if post.high is not None:
                high = tirx.const(post.high, "float32")
                return named(x, lambda y: tirx.Select(y > high, high, y))
            return x

        return named(value, clamped)

    return apply


def _bias(ctx: Context, contraction: Contraction) -> RelaxExpr | None:
    if contraction.bias is None:
        return None
    return ctx.var(Constant(np.asarray(contraction.bias, np.float32), "float32", f"{contraction.name}.bias"))


class Rows:
    """Reads of the activation: which row, and whether it lies in the padding of a convolution."""

    def __init__(self, contraction: Contraction) -> None:
        self._contraction = contraction

    def read(self, out: Sequence[Index], tap: Expr, fetch: Callable[[list[Index]], Expr], dtype: str) -> Expr:
        """fetch(leading indices of the activation), or 0 where they lie outside the image."""
        conv = self._contraction.conv
        if conv is None:
            return fetch(list(out))
        batch, oy, ox = out
        across = conv.kernel[1]
        y = oy * conv.strides[0] + (tap // across) * conv.dilations[0] - conv.pads[0]
        x = ox * conv.strides[1] + (tap % across) * conv.dilations[1] - conv.pads[1]
        if not any(conv.pads):
            return fetch([batch, y, x])
        _, height, width, _ = (dims.expression(dim) for dim in self._contraction.x_shape)
        valid = tirx.all(y >= 0, y < height, x >= 0, x < width)
        return tirx.if_then_else(valid, fetch([batch, y, x]), tirx.const(0, dtype))

    def channel(self, n: Expr, c: Expr) -> Expr:
        """Channel of the activation for channel c of output n's group."""
        conv, weight = self._contraction.conv, self._contraction.weight
        if conv is None or conv.group == 1 or weight is None:
            return c
        outputs, _, channels = weight.shape
        return (n // (outputs // conv.group)) * channels + c


def _float_product(ctx: Context, contraction: Contraction, x: RelaxExpr) -> RelaxExpr:
    """matmul or conv with float32 activations; the weight is float32, or dequantized element by element."""
    weight = contraction.weight
    if weight is None:
        raise InternalError("a product without a weight", where=contraction.name)
    n_size, taps, channels = weight.shape
    packed = packed_weight(ctx, contraction) if isinstance(weight, QTensor) else None
    plain = ctx.weight(f"{contraction.name}.weight", weight) if isinstance(weight, np.ndarray) else None
    rows, finish = Rows(contraction), _finish(contraction, _bias(ctx, contraction))

    def build(group: Group) -> list[TeTensor]:
        t = te.reduce_axis((0, taps), "t")
        c = te.reduce_axis((0, channels), "c")

        def term(indices: Sequence[Index]) -> Any:
            *out, n = indices
            channel = rows.channel(n, c.var)
            value = rows.read(out, t.var, lambda place: group.read(x, [*place, channel]), "float32")
            factor = group.read(plain, [n, t.var, c.var]) if packed is None else packed.value(group, n, t.var, c.var)
            return te.sum(value * factor, axis=[t, c])

        total = compute(contraction.out_shape, term, "product")
        return [compute(contraction.out_shape, lambda i: finish(group, total(*i), i[-1]), "result")]

    outputs = [(contraction.out_shape, "float32")]
    return ctx.kernel(f"reference_{contraction.kind}", outputs, build, kind="reduce")[0].var


def _integer_product(ctx: Context, contraction: Contraction, x: RelaxExpr) -> RelaxExpr:
    """matmul or conv with activations quantized at run time."""
    packed = packed_weight(ctx, contraction)
    n_size, taps, channels = packed.tensor.shape
    codes, scales = _quantize(ctx, contraction, x, channels, contraction.activation_block or channels)
    rows, blocks, block = Rows(contraction), packed.blocks, packed.block
    sums_shape = (*contraction.out_shape[:-1], taps * blocks, n_size)

    def accumulate(group: Group) -> list[TeTensor]:
        c = te.reduce_axis((0, block), "c")

        def term(indices: Sequence[Index]) -> Any:
            *out, which, n = indices
            t, channel = which // blocks, (which % blocks) * block + c.var
            code = rows.read(out, t, lambda place: group.read(codes, [*place, channel]), "int8")
            product = tirx.Cast("int32", code) * packed.level(group, n, t, channel)
            if channels % block:
                product = tirx.if_then_else(channel < channels, product, tirx.const(0, "int32"))
            return te.sum(product, axis=c)

        return [compute(sums_shape, term, "accumulators")]

    sums = ctx.kernel("reference_accumulate", [(sums_shape, "int32")], accumulate, kind="reduce")[0].var
    if contraction.accumulators_out:
        ctx.debug_output(f"{contraction.name}.accumulators", sums)
        ctx.debug_output(f"{contraction.name}.codes", codes)
    summed = None if packed.offsets is None else _summed_codes(ctx, contraction, packed, codes, scales)
    return _scale_sums(ctx, contraction, packed, sums, scales, summed)


def _summed_codes(
    ctx: Context, contraction: Contraction, packed: PackedWeight, codes: RelaxExpr, scales: RelaxExpr
) -> RelaxExpr:
    """float(sum of codes) * scale of every block of an activation, f32 [*rows, CB]: what offsets are multiplied by."""
    channels, block = packed.tensor.shape[2], packed.block
    shape = (*contraction.x_shape[:-1], packed.blocks)

    def build(group: Group) -> list[TeTensor]:
        c = te.reduce_axis((0, block), "c")

        def term(indices: Sequence[Index]) -> Any:
            channel = indices[-1] * block + c.var
            code = tirx.Cast("int32", group.read(codes, [*indices[:-1], channel]))
            if channels % block:
                code = tirx.if_then_else(channel < channels, code, tirx.const(0, "int32"))
            return te.sum(code, axis=c)

        total = compute(shape, term, "code_sums")
        return [compute(shape, lambda i: tirx.Cast("float32", total(*i)) * group.read(scales, list(i)), "summed")]

    return ctx.kernel("reference_summed_codes", [(shape, "float32")], build, kind="reduce")[0].var


def _scale_sums(
    ctx: Context,
    contraction: Contraction,
    packed: PackedWeight,
    sums: RelaxExpr,
    scales: RelaxExpr,
    summed: RelaxExpr | None,
) -> RelaxExpr:
    """Integer sums of all blocks, and with offsets the sums of the activation's blocks -> the float result."""
    taps, blocks = packed.tensor.shape[1], packed.blocks
    rows, finish = Rows(contraction), _finish(contraction, _bias(ctx, contraction))

    def build(group: Group) -> list[TeTensor]:
        which = te.reduce_axis((0, taps * blocks), "block")

        def term(indices: Sequence[Index]) -> Any:
            *out, n = indices
            t, block = which.var // blocks, which.var % blocks
            which_scale = block * packed.block // (contraction.activation_block or packed.tensor.shape[2])
            factor = rows.read(out, t, lambda place: group.read(scales, [*place, which_scale]), "float32")
            factor = factor * packed.scale(group, n, t, block)
            value = tirx.Cast("float32", group.read(sums, [*out, which.var, n])) * factor
            if summed is not None:
                moved = rows.read(out, t, lambda place: group.read(summed, [*place, block]), "float32")
                value = value + moved * packed.offset(group, n, t, block)
            return te.sum(value, axis=which)

        total = compute(contraction.out_shape, term, "product")
        return [compute(contraction.out_shape, lambda i: finish(group, total(*i), i[-1]), "result")]

    return ctx.kernel("reference_scale", [(contraction.out_shape, "float32")], build, kind="reduce")[0].var


def _quantize(
    ctx: Context, contraction: Contraction, x: RelaxExpr, channels: int, block: int
) -> tuple[RelaxExpr, RelaxExpr]:
    """Codes int8 [*rows, C] and scales f32 [*rows, CB] of an activation; once for all its readers."""
    key = ("reference codes", id(x), block)
    if key in ctx.memo:
        found: tuple[RelaxExpr, RelaxExpr] = ctx.memo[key][1]
        return found
    lead: tuple[Dim, ...] = contraction.x_shape[:-1]
    outputs = [((*lead, channels), "int8"), ((*lead, ceil(channels / block)), "float32")]
    made = ctx.kernel(
        "reference_quantize", outputs, lambda group: quantize_stages(group, x, lead, channels, block), kind="general"
    )
    ctx.memo[key] = (x, (made[0].var, made[1].var))
    return made[0].var, made[1].var


def quantize_stages(group: Group, x: RelaxExpr, lead: Sequence[Dim], channels: int, block: int) -> list[TeTensor]:
    """kbitc::DynamicQuantize along the last axis: codes int8 [*lead, C] and scales f32 [*lead, CB]."""
    blocks = ceil(channels / block)
    c = te.reduce_axis((0, block), "c")

    def magnitude(*indices: Index) -> Any:
        place = indices[-1] * block + c.var
        value = tirx.abs(group.read(x, [*indices[:-1], place]))
        if channels % block:
            value = tirx.if_then_else(place < channels, value, tirx.const(0.0, "float32"))
        return te.max(value, axis=c)

    peak = te.compute((*lead, blocks), magnitude, name="peak")
    smallest = tirx.const(SMALLEST, "float32")
    limit = tirx.const(LEVEL, "float32")
    amax = te.compute((*lead, blocks), lambda *i: tirx.max(peak(*i), smallest), name="amax")
    scales = te.compute((*lead, blocks), lambda *i: amax(*i) / limit, name="scales")

    def code(*indices: Index) -> Expr:
        ratio = group.read(x, indices) * (limit / amax(*indices[:-1], indices[-1] // block))
        rounded = tirx.nearbyint(ratio)
        return tirx.Cast("int8", tirx.max(tirx.min(rounded, limit), tirx.const(-LEVEL, "float32")))

    return [te.compute((*lead, channels), code, name="codes"), scales]


def _embedding(ctx: Context, contraction: Contraction, where: RelaxExpr) -> RelaxExpr:
    """Rows of a weight."""
    weight = contraction.weight
    if weight is None:
        raise InternalError("an embedding without a weight", where=contraction.name)
    packed = packed_weight(ctx, contraction) if isinstance(weight, QTensor) else None
    plain = ctx.weight(f"{contraction.name}.weight", weight) if isinstance(weight, np.ndarray) else None
    zero = tirx.IntImm("int64", 0)

    def build(group: Group) -> list[TeTensor]:
        def element(indices: Sequence[Index]) -> Expr:
            *out, c = indices
            row = inside(group.read(where, out), weight.shape[0])
            return group.read(plain, [row, zero, c]) if packed is None else packed.value(group, row, zero, c)

        return [compute(contraction.out_shape, element, "rows")]

    return ctx.kernel("reference_embedding", [(contraction.out_shape, "float32")], build)[0].var


def _batch_matmul(ctx: Context, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
    """a [..., M, C] by b [..., C, N] (or [..., N, C]); leading dimensions broadcast."""
    a, b = inputs
    a_shape, b_shape = contraction.x_shape, contraction.b_shape or ()

    def place(indices: Sequence[Index], shape: Sequence[Dim]) -> list[Index]:
        own = indices[len(indices) - (len(shape) - 2) :] if len(shape) > 2 else []
        zero = tirx.IntImm("int64", 0)
        return [zero if isinstance(dim, int) and dim == 1 else i for i, dim in zip(own, shape[:-2], strict=True)]

    def build(group: Group) -> list[TeTensor]:
        c = te.reduce_axis((0, dims.expression(a_shape[-1])), "c")

        def term(indices: Sequence[Index]) -> Any:
            *lead, row, column = indices
            pair = (column, c.var) if contraction.transpose_b else (c.var, column)
            left = group.read(a, [*place(lead, a_shape), row, c.var])
            return te.sum(left * group.read(b, [*place(lead, b_shape), *pair]), axis=c)

        return [compute(contraction.out_shape, term, "product")]

    return ctx.kernel("reference_batch_matmul", [(contraction.out_shape, "float32")], build, kind="reduce")[0].var
