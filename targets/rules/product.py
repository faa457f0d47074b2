"""The rule for integer matrix products and convolutions, the same on every target but for the kernels it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kbitc.quant.scheme import Granularity, ScaleCode
from kbitc.quant.tensor import QTensor
from kbitc.targets.kernels.dynamic_quantize import QuantizeSpec
from kbitc.targets.kernels.packed import weight_fields
from kbitc.targets.kernels.qgemm import QgemmSpec
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.rules.weights import cached, quantized_weight, weight_parameters
from kbitc.targets.target import Target

RelaxExpr = Any
Output = tuple[tuple[Any, ...], str]


@dataclass(frozen=True)
class Quantized:
    """An activation quantized at run time: codes int8, scales f32 and sums int32, each [*rows, ...]."""

    codes: RelaxExpr
    scales: RelaxExpr
    sums: RelaxExpr


@dataclass(frozen=True)
class IntegerProduct:
    """Matrix products and ungrouped convolutions of activations that are quantized at run time.

    Attributes:
        dots: integer dot instructions (`Target.dot`) that the kernels know.
        make_quantize: makes the kernel of the activation, by its name.
        make_product: makes the kernel of the product for a target, by its name.
        factors: the kernel multiplies integer block scales in integers where activations have one scale a row.
    """

    dots: tuple[str, ...]
    make_quantize: Callable[[QuantizeSpec, str], Any]
    make_product: Callable[[QgemmSpec, Target, str], Any]
    factors: bool = False
    name: str = "integer_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul or ungrouped conv with a quantized weight and int8 activations."""
        if target.dot not in self.dots:
            return f"{target.name} has no integer dot product that kbitc knows"
        if contraction.kind not in ("matmul", "conv"):
            return f"a {contraction.kind} is not a product with int8 activations"
        if not isinstance(contraction.weight, QTensor):
            return "the weight is not quantized"
        if contraction.activation != "int8":
            return "the activations are float"
        if contraction.conv is not None and contraction.conv.group != 1:
            return f"the convolution has {contraction.conv.group} groups"
        weight = contraction.weight
        if contraction.activation_block not in (0, weight.block, weight.shape[2]):
            return f"activations have blocks of {contraction.activation_block}, the weight of {weight.block}"
        operator = "MatMul" if contraction.kind == "matmul" else "Conv"
        return target.accepts(operator, "int8", weight.scheme, reduction=weight.shape[2])

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Quantize the activation (once for all its readers), then multiply."""
        weight = quantized_weight(contraction)
        spec = product_spec(contraction, weight, factors=self.factors)
        activation = self._quantize(ctx, contraction, inputs[0], spec)
        name = f"q{contraction.kind}_{weight.format.name}{weight.bits}"
        func = cached(ctx, (name, repr(spec)), lambda: self.make_product(spec, ctx.target, name))
        given = [activation.codes, activation.scales, activation.sums]
        given += weight_parameters(ctx, contraction, weight, factors=spec.factors)
        outputs: list[Output] = [(contraction.out_shape, "float32")]
        if not contraction.accumulators_out:
            return ctx.call(func, name, given, outputs)
        outputs.append(((*contraction.out_shape[:-1], spec.taps * spec.blocks, spec.outputs), "int32"))
        result, accumulators = ctx.call(func, name, given, outputs)
        ctx.debug_output(f"{contraction.name}.accumulators", accumulators)
        ctx.debug_output(f"{contraction.name}.codes", activation.codes)
        return result

    def _quantize(self, ctx: EmitContext, contraction: Contraction, x: RelaxExpr, spec: QgemmSpec) -> Quantized:
        """Codes, scales and sums of an activation; the same call serves every contraction that reads it alike."""
        rows, channels, block = spec.rows, spec.channels, spec.activation_block
        pads = contraction.conv.pads if contraction.conv is not None else (0, 0, 0, 0)
        # The hash of a variable is its identity in TVM; keeping the variable keeps the hash from being used again.
        key = ("quantized", hash(x), block, spec.block, pads)
        if key not in ctx.memo:
            padded = rows.source_shape[1:] if isinstance(rows, ConvRows) else None
            what = QuantizeSpec(contraction.x_shape[:-1], channels, block, pads, padded, spec.block)
            name = "dynamic_quantize"
            func = cached(ctx, (name, repr(what)), lambda: self.make_quantize(what, name))
            outputs: list[Output] = [
                ((*rows.source_shape, spec.padded_channels), "int8"),
                ((*rows.source_shape, spec.activation_blocks), "float32"),
                ((*rows.source_shape, spec.blocks), "int32"),
            ]
            ctx.memo[key] = (x, Quantized(*ctx.call(func, name, [x], outputs)))
        made: Quantized = ctx.memo[key][1]
        return made


def rows_of(contraction: Contraction) -> MatmulRows | ConvRows:
    """Where the kernel finds the rows of the activation."""
    if contraction.conv is None:
        return MatmulRows(contraction.x_shape[:-1])
    batch, height, width, _ = contraction.x_shape
    top, left, bottom, right = contraction.conv.pads
    _, out_height, out_width, _ = contraction.out_shape
    return ConvRows(batch, height + (top + bottom), width + (left + right), out_height, out_width, contraction.conv)


def one_scale_a_row(contraction: Contraction, weight: QTensor) -> bool:
    """Whether the weight has blocks and the activation has none."""
    channels = weight.shape[2]
    blocked = weight.scheme.granularity is Granularity.BLOCK and weight.block < channels
    return blocked and contraction.activation_block in (0, channels)


def product_spec(contraction: Contraction, weight: QTensor, *, factors: bool = False) -> QgemmSpec:
    """What the integer kernel of a contraction computes.

    Args:
        contraction: the product.
        weight: of it.
        factors: multiply integer block scales in integers where that is exact.
    """
    row_scales = one_scale_a_row(contraction, weight)
    return QgemmSpec(
        **weight_fields(weight),
        row_scales=row_scales,
        factors=factors and row_scales and weight.scheme.scale_code is ScaleCode.INTEGER,
        rows=rows_of(contraction),
        bias=contraction.bias is not None,
        post=contraction.post,
        accumulators=contraction.accumulators_out,
    )
