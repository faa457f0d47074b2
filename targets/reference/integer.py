"""Contractions of integer graphs as plain TE loops over the levels: the oracle, and the way out for any target.

acc[m, n] = bias[n] + sum over (t, c) of (x[row(m, t), c] - x_zero) * w[n, t, c]        int32, pads count nothing
q[m, n] = clip(((int64(acc) * multiplier + 2^(shift - 1)) >> shift) + zero, low, high)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from kbitc.errors import InternalError
from kbitc.quant.levels import LevelTensor
from kbitc.targets.lower import dims
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, RelaxExpr, Requantization
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.values import Constant, Expr, Index
from kbitc.targets.target import Target

Codes = Callable[[Group, Expr, Index], Expr]


@dataclass(frozen=True)
class PlainIntegers:
    """Every contraction of uint8 codes."""

    name: str = "plain_integers"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None when the activations are codes."""
        return None if contraction.activation == "uint8" else "the activations are no uint8 codes"

    def emit(self, ctx: Context, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel: the sums, then their requantization."""
        total = _batch_sums(contraction, inputs) if contraction.weight is None else _sums(ctx, contraction, inputs[0])
        bias = None if contraction.bias is None else _vector(ctx, contraction.bias, f"{contraction.name}.bias")
        codes = None if contraction.requantize is None else requantized(ctx, contraction.requantize, contraction.name)
        shape = contraction.out_shape

        def build(group: Group) -> list[TeTensor]:
            sums = compute(shape, lambda i: total(group, i), "sums")
            acc = compute(shape, lambda i: _plus(group, sums(*i), bias, i[-1]), "accumulators")
            if codes is None:
                return [acc]
            done = compute(shape, lambda i: codes(group, acc(*i), i[-1]), "codes")
            return [done, acc] if contraction.accumulators_out else [done]

        both = codes is not None and contraction.accumulators_out
        outputs = [(shape, contraction.out_dtype), *([(shape, "int32")] if both else [])]
        made = ctx.kernel(f"plain_{contraction.kind}", outputs, build, kind="reduce")
        if both:
            ctx.debug_output(f"{contraction.name}.accumulators", made[1].var)
        return made[0].var


def _plus(group: Group, value: Expr, bias: RelaxExpr | None, n: Index) -> Expr:
    return value if bias is None else value + group.read(bias, [n])


def _vector(ctx: Context, values: Any, name: str, dtype: str = "int32") -> RelaxExpr:
    return ctx.var(Constant(np.ascontiguousarray(values, dtype).reshape(-1), dtype, name))


def requantized(ctx: Context, requantize: Requantization, name: str, dtype: str = "uint8") -> Codes:
    """(group, accumulator, channel) -> code, by the one rounding rule, in 64 bits.

    Args:
        ctx: holds the numbers where they differ by channel.
        requantize: the numbers.
        name: of those parameters.
        dtype: of the code.
    """
    shift = np.asarray(requantize.shift, np.int64).reshape(-1)
    numbers = [np.asarray(requantize.multiplier, np.int64).reshape(-1), np.int64(1) << (shift - 1), shift]
    read = [_number(ctx, array, f"{name}.{part}") for array, part in zip(numbers, _PARTS, strict=True)]

    def codes(group: Group, acc: Expr, channel: Index) -> Expr:
        multiplier, half, bits = (item(group, channel) for item in read)
        wide = tirx.Cast("int64", acc) * multiplier
        moved = ((wide + half) >> bits) + tirx.const(requantize.zero, "int64")
        low, high = (tirx.const(limit, "int64") for limit in (requantize.low, requantize.high))
        return tirx.Cast(dtype, tirx.max(tirx.min(moved, high), low))

    return codes


_PARTS = ("multiplier", "half", "shift")


def _number(ctx: Context, array: Any, name: str) -> Callable[[Group, Index], Expr]:
    """One number for all channels as a constant, else read by channel. Numbers of 31 bits are stored as int32."""
    if np.all(array == array[0]):
        return lambda group, channel: tirx.const(int(array[0]), "int64")
    dtype = "int64" if array.max() >= 2**31 else "int32"
    var = _vector(ctx, array, name, dtype)
    return lambda group, channel: tirx.Cast("int64", group.read(var, [channel]))


def _sums(ctx: Context, contraction: Contraction, x: RelaxExpr) -> Callable[[Group, Sequence[Index]], Expr]:
    """matmul or conv by constant levels."""
    weight = contraction.weight
    if not isinstance(weight, LevelTensor):
        raise InternalError("an integer product without levels", where=contraction.name)
    outputs, taps, channels = weight.shape
    levels = ctx.weight(f"{contraction.name}.levels", weight.levels())
    group_size = outputs // (1 if contraction.conv is None else contraction.conv.group)

    def total(group: Group, indices: Sequence[Index]) -> Expr:
        *out, n = indices
        t, c = te.reduce_axis((0, taps), "t"), te.reduce_axis((0, channels), "c")
        channel = c.var if group_size == outputs else tirx.floordiv(n, group_size) * channels + c.var
        value = _pixel(contraction, group, x, out, t.var, channel)
        return te.sum(value * tirx.Cast("int32", group.read(levels, [n, t.var, c.var])), axis=[t, c])

    return total


def _pixel(
    contraction: Contraction, group: Group, x: RelaxExpr, out: Sequence[Index], tap: Expr, channel: Expr
) -> Expr:
    """x - x_zero under a tap of an output row, 0 in the border."""
    conv = contraction.conv

    def difference(place: Sequence[Index]) -> Expr:
        code = tirx.Cast("int32", group.read(x, [*place, channel]))
        return code - tirx.const(contraction.x_zero, "int32")

    if conv is None:
        return difference(out)
    image, oy, ox = out
    across = conv.kernel[1]
    y = oy * conv.strides[0] + tirx.floordiv(tap, across) * conv.dilations[0] - conv.pads[0]
    z = ox * conv.strides[1] + tirx.floormod(tap, across) * conv.dilations[1] - conv.pads[1]
    if not any(conv.pads):
        return difference([image, y, z])
    _, height, width, _ = (dims.expression(dim) for dim in contraction.x_shape)
    inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
    return tirx.if_then_else(inside, difference([image, y, z]), tirx.const(0, "int32"))


def _batch_sums(contraction: Contraction, inputs: Sequence[RelaxExpr]) -> Callable[[Group, Sequence[Index]], Expr]:
    """(a - x_zero) [..., M, C] by (b - b_zero) [..., C, N] or [..., N, C]; leading dimensions broadcast."""
    a, b = inputs
    a_shape, b_shape = contraction.x_shape, contraction.b_shape or ()
    zero = tirx.IntImm("int64", 0)

    def place(indices: Sequence[Index], shape: Sequence[Any]) -> list[Index]:
        own = indices[len(indices) - (len(shape) - 2) :] if len(shape) > 2 else []
        return [zero if isinstance(dim, int) and dim == 1 else i for i, dim in zip(own, shape[:-2], strict=True)]

    def total(group: Group, indices: Sequence[Index]) -> Expr:
        *lead, row, column = indices
        c = te.reduce_axis((0, dims.expression(a_shape[-1])), "c")
        pair = [column, c.var] if contraction.transpose_b else [c.var, column]
        left = tirx.Cast("int32", group.read(a, [*place(lead, a_shape), row, c.var]))
        right = tirx.Cast("int32", group.read(b, [*place(lead, b_shape), *pair]))
        product = (left - tirx.const(contraction.x_zero, "int32")) * (right - tirx.const(contraction.b_zero, "int32"))
        return te.sum(product, axis=c)

    return total
