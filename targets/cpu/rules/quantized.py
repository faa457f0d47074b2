"""Kernel rules for contractions with quantized weights on x86 and NEON: when each takes a contraction, and how.

The rules differ in the generator they call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbitc.errors import InternalError
from kbitc.quant.tensor import QTensor
from kbitc.targets.kernels.border import BorderSpec, make_border
from kbitc.targets.kernels.dynamic_quantize import make_dynamic_quantize
from kbitc.targets.kernels.embedding import EmbeddingSpec, make_embedding
from kbitc.targets.kernels.grouped_conv import MOST_WEIGHTS, GroupedSpec, make_grouped_conv
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.kernels.packed import WeightSpec, weight_fields
from kbitc.targets.kernels.qgemm import make_qgemm
from kbitc.targets.kernels.rows import MatmulRows
from kbitc.targets.kernels.wgemm import WgemmSpec, make_wgemm
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.rules.product import IntegerProduct, rows_of
from kbitc.targets.rules.weights import cached, quantized_weight, weight_parameters
from kbitc.targets.target import Target

RelaxExpr = Any


@dataclass(frozen=True)
class WeightOnlyProduct:
    """Matrix products of float activations: `kernels/wgemm.py`."""

    name: str = "weight_only_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul with a quantized weight and float activations."""
        if contraction.kind != "matmul":
            return f"a {contraction.kind} is not a matrix product"
        return _weight_only(contraction, target)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel, which dequantizes in registers."""
        weight = quantized_weight(contraction)
        spec = WgemmSpec(
            **weight_fields(weight),
            rows=MatmulRows(contraction.x_shape[:-1]),
            bias=contraction.bias is not None,
            post=contraction.post,
        )
        isa = isa_of(ctx.target)
        func = cached(ctx, ("wgemm", repr(spec), isa.name), lambda: make_wgemm(spec, isa, "wgemm"))
        given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        return ctx.call(func, "wgemm", given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class WeightOnlyGroupedConv:
    """Depthwise and grouped convolutions of float activations: `kernels/grouped_conv.py`."""

    name: str = "weight_only_grouped_conv"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a grouped conv with a small quantized weight a channel and float activations."""
        if contraction.kind != "conv" or contraction.conv is None or contraction.conv.group == 1:
            return "not a grouped convolution"
        if isinstance(contraction.weight, QTensor):
            _, taps, channels = contraction.weight.shape
            if taps * channels > MOST_WEIGHTS:
                return f"{taps} taps of {channels} channels are more weights a channel than {MOST_WEIGHTS}"
        return _weight_only(contraction, target)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel; the border is never written to memory."""
        weight = quantized_weight(contraction)
        if contraction.conv is None:
            raise InternalError("a convolution without geometry", where=contraction.name)
        batch, height, width, _ = contraction.x_shape
        _, out_height, out_width, _ = contraction.out_shape
        spec = GroupedSpec(
            weight=WeightSpec(**weight_fields(weight)),
            image=(batch, height, width),
            out=(out_height, out_width),
            attributes=contraction.conv,
            bias=contraction.bias is not None,
            post=contraction.post,
        )
        isa = isa_of(ctx.target)
        func = cached(ctx, ("grouped_conv", repr(spec), isa.name), lambda: make_grouped_conv(spec, isa, "grouped_conv"))
        given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        return ctx.call(func, "grouped_conv", given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class PackedEmbedding:
    """Rows of a packed table by index: `kernels/embedding.py`."""

    name: str = "packed_embedding"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for an embedding with a quantized table of one tap."""
        if contraction.kind != "embedding":
            return f"a {contraction.kind} is not an embedding"
        if not isinstance(contraction.weight, QTensor):
            return "the table is not quantized"
        if contraction.weight.shape[1] != 1:
            return "the table has more than one tap"
        return None

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel, which dequantizes the rows it reads."""
        weight = quantized_weight(contraction)
        fields = weight_fields(weight)
        spec = EmbeddingSpec(**fields, lead=contraction.x_shape, index_dtype=contraction.index_dtype)
        func = cached(ctx, ("embedding", repr(spec)), lambda: make_embedding(spec, "embedding"))
        given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        if not weight.format.uniform:
            given.append(ctx.weight(f"{contraction.name}.levels", weight.format.grid.astype(np.float32)))
        return ctx.call(func, "embedding", given, [(contraction.out_shape, "float32")])


INTEGER_PRODUCT = IntegerProduct(
    ("vpdpbusd", "vpdpbusd_ymm", "vpmaddwd", "sdot"),
    make_dynamic_quantize,
    lambda spec, target, name: make_qgemm(spec, isa_of(target), name),
    factors=True,
)
# In order of preference; the reference rule comes after them.
RULES = (INTEGER_PRODUCT, WeightOnlyProduct(), WeightOnlyGroupedConv(), PackedEmbedding())


def _weight_only(contraction: Contraction, target: Target) -> str | None:
    """Why a product of float activations is not for the rules here."""
    if not isinstance(contraction.weight, QTensor):
        return "the weight is not quantized"
    if contraction.activation != "float32":
        return "the activations are int8"
    operator = "MatMul" if contraction.kind == "matmul" else "Conv"
    return target.accepts(operator, "float32", contraction.weight.scheme)


def bordered(ctx: EmitContext, contraction: Contraction, x: RelaxExpr) -> RelaxExpr:
    """The activation of a convolution with its border of zeros in memory; shared by all its readers."""
    if contraction.conv is None or not any(contraction.conv.pads):
        return x
    pads = contraction.conv.pads
    key = ("bordered", hash(x), pads)
    if key not in ctx.memo:
        *lead, channels = contraction.x_shape
        what = BorderSpec(tuple(lead), channels, pads, "float32", 0.0)
        func = cached(ctx, ("pad_rows", repr(what)), lambda: make_border(what, "pad_rows"))
        shape = (*rows_of(contraction).source_shape, channels)
        ctx.memo[key] = (x, ctx.call(func, "pad_rows", [x], [(shape, "float32")]))
    return ctx.memo[key][1]
