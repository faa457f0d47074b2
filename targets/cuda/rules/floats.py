"""Products with float activations, of dense and of k-bit weights, and rows of quantized embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from kbitc.errors import InternalError
from kbitc.quant.packing import LANES, round_up
from kbitc.quant.tensor import QTensor
from kbitc.targets.cuda.kernels.dequantize import make_dequantize, make_embedding
from kbitc.targets.cuda.kernels.sgemm import SgemmSpec, make_sgemm
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.packed import WeightSpec, weight_fields
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.rules.base import KIND
from kbitc.targets.rules.weights import cached, quantized_weight, weight_parameters
from kbitc.targets.target import Target

RelaxExpr = Any
TeTensor = Any
Expr = Any


@dataclass(frozen=True)
class QuantizedEmbedding:
    """Rows of a quantized table."""

    name: str = "embedding"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for an embedding with a quantized weight."""
        if contraction.kind != "embedding":
            return f"a {contraction.kind} is not an embedding"
        if not isinstance(contraction.weight, QTensor):
            return "the table is not quantized"
        return target.accepts("Gather", "float32", contraction.weight.scheme)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel."""
        weight = quantized_weight(contraction)
        spec, lead, dtype = WeightSpec(**weight_fields(weight)), contraction.x_shape, contraction.index_dtype
        name = f"embedding_{weight.format.name}{weight.bits}"
        func = cached(
            ctx, ("cuda", name, repr(spec), repr(lead), dtype), lambda: make_embedding(spec, lead, dtype, name)
        )
        given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        return ctx.call(func, name, given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class FloatProduct:
    """Matrix products and ungrouped convolutions of float activations: `kernels/sgemm.py`."""

    name: str = "float_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a product with float activations."""
        if contraction.activation != "float32":
            return "the activations are int8"
        if contraction.kind == "embedding":
            return "an embedding is no product"
        if contraction.conv is not None and contraction.conv.group != 1:
            return f"the convolution has {contraction.conv.group} groups"
        return None

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel; packed weights are unpacked inside it."""
        weight = contraction.weight
        spec = SgemmSpec(
            x_shape=contraction.x_shape,
            out_shape=contraction.out_shape,
            conv=contraction.conv,
            taps=1 if weight is None else weight.shape[1],
            weight=WeightSpec(**weight_fields(weight)) if isinstance(weight, QTensor) else None,
            b_shape=contraction.b_shape if weight is None else None,
            transpose_b=contraction.transpose_b,
            bias=contraction.bias is not None,
            post=contraction.post,
        )
        name = f"f{contraction.kind}" + (f"_{weight.format.name}{weight.bits}" if isinstance(weight, QTensor) else "")
        func = cached(ctx, ("cuda", name, repr(spec)), lambda: make_sgemm(spec, name))
        if isinstance(weight, QTensor):
            given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        elif weight is not None:
            given = [inputs[0], dense_weight(ctx, contraction), *bias_parameter(ctx, contraction)]
        else:
            given = list(inputs[:2])
        return ctx.call(func, name, given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class GroupedConvolution:
    """Grouped and depthwise convolutions of float activations, as TE loops: a thread for each result.

    A quantized weight is unpacked to float32 [T, C, N] first, by a kernel of its own.
    """

    name: str = "grouped_convolution"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a convolution with float activations."""
        if contraction.kind != "conv":
            return f"a {contraction.kind} is not a convolution"
        return None if contraction.activation == "float32" else "the activations are int8"

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """A TE kernel; the schedule rules bind its threads."""
        weight = contraction.weight
        if isinstance(weight, QTensor):
            spec = WeightSpec(**weight_fields(weight))
            name = f"dequantize_{weight.format.name}{weight.bits}"
            unpack = cached(ctx, ("cuda", name, repr(spec)), lambda: make_dequantize(spec, name))
            count = 3 if spec.zero_point or spec.offset else 2
            parameters = weight_parameters(ctx, contraction, weight)
            dense = ctx.call(unpack, name, parameters[:count], [((spec.taps, spec.channels, spec.outputs), "float32")])
            given = [inputs[0], dense, *parameters[count:]]
        else:
            given = [inputs[0], dense_weight(ctx, contraction), *bias_parameter(ctx, contraction)]
        func = convolution(contraction)
        return ctx.call(func, "grouped_conv", given, [(contraction.out_shape, "float32")])


def dense_weight(ctx: EmitContext, contraction: Contraction) -> RelaxExpr:
    """A float weight as a parameter float32 [T, C, N]; stored once however many nodes use it."""
    weight = contraction.weight
    if weight is None or isinstance(weight, QTensor):
        raise InternalError("a product without a float weight", where=contraction.name)
    key = ("cuda", "float weight", id(weight))
    if key not in ctx.memo:
        dense = np.ascontiguousarray(np.asarray(weight, np.float32).transpose(1, 2, 0))
        ctx.memo[key] = (weight, ctx.weight(f"{contraction.name}.weight", dense))
    return ctx.memo[key][1]


def bias_parameter(ctx: EmitContext, contraction: Contraction) -> list[RelaxExpr]:
    """The bias of a float weight as a parameter float32 [N], if there is one."""
    if contraction.bias is None:
        return []
    return [ctx.weight(f"{contraction.name}.bias", np.asarray(contraction.bias, np.float32))]


def _group(tensors: Sequence[TeTensor]) -> Any:
    """A prim func of TE tensors with variables of its own."""
    func = te.create_prim_func(list(tensors), "int64").without_attr("global_symbol")
    return s_tir.renew_defs(func).with_attrs({KIND: "general", "tirx.noalias": True})


def _finish(contraction: Contraction, total: TeTensor, bias: TeTensor | None) -> list[TeTensor]:
    """Bias and clamp; the arguments bias (if any) and result."""
    if bias is None and contraction.post is None:
        return [total]

    def element(*indices: Expr) -> Expr:
        value = total(*indices)
        if bias is not None:
            value = value + bias[indices[-1]]
        return _clamp(value, contraction)

    out = te.compute(tuple(total.shape), element, name="out")
    return [out] if bias is None else [bias, out]


def _clamp(value: Expr, contraction: Contraction) -> Expr:
    post = contraction.post
    if post is None:
        return value
    if post.low is not None:
        low = tirx.const(post.low, "float32")
        value = tirx.Select(value < low, low, value)
    if post.high is not None:
        high = tirx.const(post.high, "float32")
        value = tirx.Select(value > high, high, value)
    return value


def _bias(contraction: Contraction) -> TeTensor | None:
    """As the rules store it: [N] beside a float weight, padded to whole tiles beside a packed one."""
    if contraction.bias is None:
        return None
    n = int(contraction.out_shape[-1])
    length = round_up(n, LANES) if isinstance(contraction.weight, QTensor) else n
    return te.placeholder((length,), "float32", name="bias")


def convolution(contraction: Contraction) -> Any:
    """x [B, H, W, C * group], weight [T, C, N], bias [N] (if any) -> [B, OH, OW, N]."""
    conv = contraction.conv
    if conv is None or contraction.weight is None:
        raise InternalError("a convolution without geometry", where=contraction.name)
    dims = v.DimVars()
    n, taps, channels = contraction.weight.shape
    x = te.placeholder(tuple(dims(d) for d in contraction.x_shape), "float32", name="x")
    w = te.placeholder((taps, channels, n), "float32", name="w")
    out = tuple(dims(d) for d in contraction.out_shape)
    ky, kx = te.reduce_axis((0, conv.kernel[0]), "ky"), te.reduce_axis((0, conv.kernel[1]), "kx")
    c = te.reduce_axis((0, channels), "c")
    read = _padded(x, conv.pads)
    per_group = n // conv.group

    def element(b: Expr, oy: Expr, ox: Expr, o: Expr) -> Expr:
        y = oy * conv.strides[0] + ky * conv.dilations[0]
        across = ox * conv.strides[1] + kx * conv.dilations[1]
        channel = c if conv.group == 1 else (o // per_group) * channels + c
        return te.sum(read(b, y, across, channel) * w[ky * conv.kernel[1] + kx, c, o], axis=[ky, kx, c])

    total = te.compute(out, element, name="conv")
    return _group([x, w, *_finish(contraction, total, _bias(contraction))])


def _padded(x: TeTensor, pads: tuple[int, int, int, int]) -> Callable[..., Expr]:
    """Reads x at positions that count from the corner of its zero border."""
    if not any(pads):
        return lambda b, y, across, c: x[b, y, across, c]
    top, left, _, _ = pads

    def read(b: Expr, y: Expr, across: Expr, c: Expr) -> Expr:
        inside = tirx.all(y >= top, y < x.shape[1] + top, across >= left, across < x.shape[2] + left)
        return tirx.if_then_else(inside, x[b, y - top, across - left, c], tirx.const(0.0, "float32"))

    return read
