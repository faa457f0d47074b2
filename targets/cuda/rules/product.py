"""Integer matrix products and convolutions: `kernels/qgemv.py` (dp4a) and `kernels/qgemm.py` (tensor cores)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kbitc.quant.tensor import QTensor
from kbitc.targets.cpu.rules.quantized import (
    Output,
    Quantized,
    cached,
    product_spec,
    quantized_weight,
    weight_parameters,
)
from kbitc.targets.cuda.kernels.product import make_product
from kbitc.targets.cuda.kernels.quantize import make_quantize
from kbitc.targets.kernels.dynamic_quantize import QuantizeSpec
from kbitc.targets.kernels.qgemm import QgemmSpec
from kbitc.targets.kernels.rows import ConvRows
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.target import Target

RelaxExpr = Any


@dataclass(frozen=True)
class IntegerProduct:
    """Matrix products and ungrouped convolutions of activations that are quantized at run time."""

    name: str = "integer_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul or ungrouped conv with a quantized weight and int8 activations."""
        if contraction.kind not in ("matmul", "conv"):
            return f"a {contraction.kind} is not a product with int8 activations"
        if not isinstance(contraction.weight, QTensor):
            return "the weight is not quantized"
        if contraction.activation != "int8":
            return "the activations are float"
        if contraction.conv is not None and contraction.conv.group != 1:
            return f"the convolution has {contraction.conv.group} groups"
        weight = contraction.weight
        if contraction.activation_block not in (0, weight.block):
            return f"activations have blocks of {contraction.activation_block}, the weight of {weight.block}"
        operator = "MatMul" if contraction.kind == "matmul" else "Conv"
        return target.accepts(operator, "int8", weight.scheme, reduction=weight.shape[2])

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Quantize the activation (once for all its readers), then multiply."""
        weight = quantized_weight(contraction)
        spec = product_spec(contraction, weight)
        activation = quantize(ctx, contraction, inputs[0], spec)
        name = f"q{contraction.kind}_{weight.format.name}{weight.bits}"
        func = cached(ctx, ("cuda", name, repr(spec)), lambda: make_product(spec, name))
        given = [activation.codes, activation.scales, activation.sums, *weight_parameters(ctx, contraction, weight)]
        outputs: list[Output] = [(contraction.out_shape, "float32")]
        if not contraction.accumulators_out:
            return ctx.call(func, name, given, outputs)
        outputs.append(((*contraction.out_shape[:-1], spec.taps * spec.blocks, spec.outputs), "int32"))
        result, accumulators = ctx.call(func, name, given, outputs)
        ctx.debug_output(f"{contraction.name}.accumulators", accumulators)
        ctx.debug_output(f"{contraction.name}.codes", activation.codes)
        return result


def quantize(ctx: EmitContext, contraction: Contraction, x: RelaxExpr, spec: QgemmSpec) -> Quantized:
    """Codes, scales and sums of an activation; the same call serves every contraction that reads it alike."""
    rows, channels, block = spec.rows, spec.channels, spec.block
    pads = contraction.conv.pads if contraction.conv is not None else (0, 0, 0, 0)
    # The variable itself is kept beside the result so that its identity is not reused.
    key = ("quantized", id(x), block, pads)
    if key not in ctx.memo:
        padded = rows.source_shape[1:] if isinstance(rows, ConvRows) else None
        what = QuantizeSpec(contraction.x_shape[:-1], channels, block, pads, padded)
        func = cached(ctx, ("cuda", "quantize", repr(what)), lambda: make_quantize(what, "dynamic_quantize"))
        outputs: list[Output] = [
            ((*rows.source_shape, spec.padded_channels), "int8"),
            ((*rows.source_shape, spec.blocks), "float32"),
            ((*rows.source_shape, spec.blocks), "int32"),
        ]
        ctx.memo[key] = (x, Quantized(*ctx.call(func, "dynamic_quantize", [x], outputs)))
    made: Quantized = ctx.memo[key][1]
    return made
