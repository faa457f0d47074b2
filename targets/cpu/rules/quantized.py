"""Kernel rules for contractions with quantized weights on x86 and NEON: when each takes a contraction, and how.

The rules differ in the generator they call. What the memory of a weight looks like is decided here once:
`<name>.codes` (packed), `<name>.scales`, `<name>.zero_points` and `<name>.bias` become parameters of main.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import InternalError
from kbitc.quant.packing import LANES, pack_codes, pack_per_channel, round_up
from kbitc.quant.scheme import Granularity, ScaleType
from kbitc.quant.tensor import QTensor
from kbitc.targets.kernels.dynamic_quantize import QuantizeSpec, make_dynamic_quantize
from kbitc.targets.kernels.embedding import EmbeddingSpec, make_embedding
from kbitc.targets.kernels.grouped_conv import MOST_WEIGHTS, GroupedSpec, make_grouped_conv
from kbitc.targets.kernels.isa import isa_of, stored_zero_points
from kbitc.targets.kernels.pad_rows import make_pad_rows
from kbitc.targets.kernels.qgemm import QgemmSpec, make_qgemm
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.kernels.wgemm import WgemmSpec, make_wgemm
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.target import Target

RelaxExpr = Any
SCALE_DTYPES = {ScaleType.F16: "float16", ScaleType.F32: "float32"}
Output = tuple[tuple[Any, ...], str]
DOTS = ("vpdpbusd", "vpmaddwd", "sdot")


@dataclass(frozen=True)
class Quantized:
    """An activation quantized at run time: codes int8, scales f32 and sums int32, each [*rows, ...]."""

    codes: RelaxExpr
    scales: RelaxExpr
    sums: RelaxExpr


@dataclass(frozen=True)
class IntegerProduct:
    """Matrix products and convolutions of int8 activations: `kernels/qgemm.py`."""

    name: str = "integer_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul or ungrouped conv with a quantized weight and int8 activations."""
        if target.dot not in DOTS:
            return f"{target.name} has no integer dot product that kbitc knows"
        if contraction.kind not in ("matmul", "conv"):
            return f"a {contraction.kind} is not a product with int8 activations"
        if not isinstance(contraction.weight, QTensor):
            return "the weight is not quantized"
        if contraction.activation != "int8":
            return "the activations are float"
        if contraction.conv is not None and contraction.conv.group != 1:
            return f"the convolution has {contraction.conv.group} groups"
        if contraction.activation_block not in (0, contraction.weight.block):
            return (
                f"activations have blocks of {contraction.activation_block}, the weight of {contraction.weight.block}"
            )
        operator = "MatMul" if contraction.kind == "matmul" else "Conv"
        return target.accepts(operator, "int8", contraction.weight.scheme, reduction=contraction.weight.shape[2])

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Quantize the activation (once for all its readers), then multiply."""
        weight = quantized_weight(contraction)
        spec = product_spec(contraction, weight)
        activation = quantize(ctx, contraction, inputs[0], spec)
        isa = isa_of(ctx.target)
        name = f"qgemm_{contraction.kind}"
        func = cached(ctx, (name, repr(spec), isa.name), lambda: make_qgemm(spec, isa, name))
        given = [activation.codes, activation.scales, activation.sums, *weight_parameters(ctx, contraction, weight)]
        outputs: list[Output] = [(contraction.out_shape, "float32")]
        if not contraction.accumulators_out:
            return ctx.call(func, name, given, outputs)
        outputs.append(((*contraction.out_shape[:-1], spec.taps * spec.blocks, spec.outputs), "int32"))
        result, accumulators = ctx.call(func, name, given, outputs)
        ctx.debug_output(f"{contraction.name}.accumulators", accumulators)
        ctx.debug_output(f"{contraction.name}.codes", activation.codes)
        return result


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
        spec = weight_only_spec(contraction, weight)
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
        inner = replace(weight_only_spec(contraction, weight), rows=MatmulRows((1,)))
        spec = GroupedSpec(inner, (batch, height, width), (out_height, out_width), contraction.conv)
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
        rows, _, channels = weight.shape
        spec = EmbeddingSpec(
            lead=contraction.x_shape,
            rows=rows,
            channels=channels,
            data_type=weight.format,
            block=min(weight.block, channels),
            scale_dtype=SCALE_DTYPES[weight.scheme.scale_type],
            zero_point=weight.zero_points is not None,
            index_dtype=contraction.index_dtype,
        )
        func = cached(ctx, ("embedding", repr(spec)), lambda: make_embedding(spec, "embedding"))
        given = [inputs[0], *weight_parameters(ctx, contraction, weight)]
        if not weight.format.uniform:
            given.append(ctx.weight(f"{contraction.name}.levels", weight.format.grid.astype(np.float32)))
        return ctx.call(func, "embedding", given, [(contraction.out_shape, "float32")])


# In order of preference; the reference rule comes after them.
RULES = (IntegerProduct(), WeightOnlyProduct(), WeightOnlyGroupedConv(), PackedEmbedding())


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
        rows = rows_of(contraction)
        batch, height, width = rows.source_shape
        channels = contraction.x_shape[-1]
        lead = contraction.x_shape[:-1]
        func = cached(
            ctx,
            ("pad_rows", repr((lead, height, width, channels, pads))),
            lambda: make_pad_rows(lead, (height, width), channels, pads, "pad_rows"),
        )
        ctx.memo[key] = (x, ctx.call(func, "pad_rows", [x], [((batch, height, width, channels), "float32")]))
    return ctx.memo[key][1]


def weight_only_spec(contraction: Contraction, weight: QTensor) -> WgemmSpec:
    """What the float kernel of a contraction computes."""
    n, taps, channels = weight.shape
    return WgemmSpec(
        rows=rows_of(contraction),
        channels=channels,
        outputs=n,
        taps=taps,
        data_type=weight.format,
        block=min(weight.block, channels),
        scale_per_block=weight.scheme.granularity is Granularity.BLOCK,
        scale_dtype=SCALE_DTYPES[weight.scheme.scale_type],
        zero_point=weight.zero_points is not None,
        bias=contraction.bias is not None,
        post=contraction.post,
    )


def quantized_weight(contraction: Contraction) -> QTensor:
    """The weight of a contraction that a rule here has taken."""
    if not isinstance(contraction.weight, QTensor):
        raise InternalError("a rule for quantized weights was given another", where=contraction.name)
    return contraction.weight


def cached(ctx: EmitContext, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
    """Build a kernel once for all contractions of the same specification."""
    if key not in ctx.memo:
        ctx.memo[key] = make()
    return ctx.memo[key]


def rows_of(contraction: Contraction) -> MatmulRows | ConvRows:
    """Where the kernel finds the rows of the activation."""
    if contraction.conv is None:
        return MatmulRows(contraction.x_shape[:-1])
    batch, height, width, _ = contraction.x_shape
    top, left, bottom, right = contraction.conv.pads
    _, out_height, out_width, _ = contraction.out_shape
    return ConvRows(batch, height + (top + bottom), width + (left + right), out_height, out_width, contraction.conv)


def product_spec(contraction: Contraction, weight: QTensor) -> QgemmSpec:
    """What the integer kernel of a contraction computes."""
    n, taps, channels = weight.shape
    return QgemmSpec(
        rows=rows_of(contraction),
        channels=channels,
        outputs=n,
        taps=taps,
        data_type=weight.format,
        block=min(weight.block, channels),
        scale_per_block=weight.scheme.granularity is Granularity.BLOCK,
        scale_dtype=SCALE_DTYPES[weight.scheme.scale_type],
        zero_point=weight.zero_points is not None,
        bias=contraction.bias is not None,
        post=contraction.post,
        accumulators=contraction.accumulators_out,
    )


def quantize(ctx: EmitContext, contraction: Contraction, x: RelaxExpr, spec: QgemmSpec) -> Quantized:
    """Codes, scales and sums of an activation; the same call serves every contraction that reads it alike."""
    rows, channels, block = spec.rows, spec.channels, spec.block
    pads = contraction.conv.pads if contraction.conv is not None else (0, 0, 0, 0)
    # The hash of a variable is its identity in TVM; keeping the variable keeps the hash from being used again.
    key = ("quantized", hash(x), block, pads)
    if key not in ctx.memo:
        padded = rows.source_shape[1:] if isinstance(rows, ConvRows) else None
        what = QuantizeSpec(contraction.x_shape[:-1], channels, block, pads, padded)
        func = cached(ctx, ("dynamic_quantize", repr(what)), lambda: make_dynamic_quantize(what, "dynamic_quantize"))
        outputs: list[Output] = [
            ((*rows.source_shape, spec.padded_channels), "int8"),
            ((*rows.source_shape, spec.blocks), "float32"),
            ((*rows.source_shape, spec.blocks), "int32"),
        ]
        ctx.memo[key] = (x, Quantized(*ctx.call(func, "dynamic_quantize", [x], outputs)))
    made: Quantized = ctx.memo[key][1]
    return made


def weight_parameters(ctx: EmitContext, contraction: Contraction, weight: QTensor) -> list[RelaxExpr]:
    """Packed codes, scales, zero points and bias, in the order in which every kernel takes them.

    A weight that several contractions share is stored once.
    """
    key = ("weight", id(weight))
    if key not in ctx.memo:
        ctx.memo[key] = (weight, [ctx.weight(f"{contraction.name}.{part}", array) for part, array in stored(weight)])
    parameters: list[RelaxExpr] = list(ctx.memo[key][1])
    if contraction.bias is not None:
        padded = np.zeros(round_up(weight.shape[0], LANES), np.float32)
        padded[: weight.shape[0]] = contraction.bias
        parameters.append(ctx.weight(f"{contraction.name}.bias", padded))
    return parameters


def stored(weight: QTensor) -> list[tuple[str, npt.NDArray[Any]]]:
    """The arrays of a weight as they lie in memory, by the part of their name."""
    n = weight.shape[0]
    scales = weight.scales.astype(SCALE_DTYPES[weight.scheme.scale_type])
    parts: list[tuple[str, npt.NDArray[Any]]] = [
        ("codes", pack_codes(weight.codes, weight.bits)),
        ("scales", pack_per_channel(scales, n)),
    ]
    if weight.zero_points is not None:
        parts.append(("zero_points", pack_per_channel(stored_zero_points(weight.zero_points, weight.format), n)))
    return parts
