"""Convolutions of float activations by a packed weight: unpack the weight, then the float kernel.

A convolution meets each weight once a pixel, so unpacking it once a call costs little, and the float kernels are
at the speed of float. Matrix products of float activations stay with `WeightOnlyProduct`, which reads packed
weights alone: with few rows their time is the time of reading the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kbitc.errors import InternalError
from kbitc.quant.packing import LANES, round_up
from kbitc.quant.scheme import Granularity
from kbitc.quant.tensor import QTensor
from kbitc.targets.cpu.rules.float import depthwise_kernel, product_kernel
from kbitc.targets.cpu.rules.quantized import bordered
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.kernels.packed import WeightSpec, weight_fields
from kbitc.targets.kernels.unpack import make_unpack, merged
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.rules.weights import cached, quantized_weight, stored
from kbitc.targets.target import Target

RelaxExpr = Any


@dataclass(frozen=True)
class UnpackedConv:
    """Ungrouped and depthwise convolutions: `kernels/unpack.py`, then `kernels/fgemm.py` or `fdepthwise.py`."""

    name: str = "unpacked_conv"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a conv with a quantized weight, float activations, and one group or one channel a group."""
        if contraction.conv is None:
            return f"a {contraction.kind} is not a convolution"
        if not isinstance(contraction.weight, QTensor):
            return "the weight is not quantized"
        if contraction.activation != "float32":
            return "the activations are int8"
        if contraction.conv.group != 1 and not _is_depthwise(contraction):
            return f"the convolution has {contraction.conv.group} groups of several channels"
        return target.accepts("Conv", "float32", contraction.weight.scheme)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Unpack, then multiply."""
        unpacked = _unpacked(ctx, contraction)
        depthwise = contraction.conv is not None and contraction.conv.group != 1
        func, name = (depthwise_kernel if depthwise else product_kernel)(ctx, contraction)
        # The depthwise kernel tests the border itself.
        x = inputs[0] if depthwise else bordered(ctx, contraction, inputs[0])
        given = [x, unpacked]
        if contraction.bias is not None:
            padded = np.zeros(round_up(contraction.bias.size, LANES), np.float32)
            padded[: contraction.bias.size] = contraction.bias
            given.append(ctx.weight(f"{contraction.name}.bias", padded))
        return ctx.call(func, name, given, [(contraction.out_shape, "float32")])


def _is_depthwise(contraction: Contraction) -> bool:
    weight = contraction.weight
    if contraction.conv is None or weight is None:
        raise InternalError("a convolution without geometry or weight", where=contraction.name)
    n, _, channels = weight.shape
    return bool(channels == 1 and contraction.conv.group == n)


def _unpacked(ctx: EmitContext, contraction: Contraction) -> RelaxExpr:
    """The float32 weight [tiles, T * C, 16]; computed once for contractions that share it."""
    weight = quantized_weight(contraction)
    key = ("unpacked", id(weight))
    if key not in ctx.memo:
        spec = merged(WeightSpec(**weight_fields(weight)))
        isa = isa_of(ctx.target)
        func = cached(ctx, ("unpack", repr(spec), isa.name), lambda: make_unpack(spec, isa, "unpack"))
        given = [ctx.weight(f"{contraction.name}.{part}", array) for part, array in stored(taps_merged(weight))]
        shape = (spec.output_tiles, spec.taps * spec.channels, LANES)
        ctx.memo[key] = (weight, ctx.call(func, "unpack", given, [(shape, "float32")]))
    return ctx.memo[key][1]


def taps_merged(weight: QTensor) -> QTensor:
    """The weight seen as [N, 1, T * C] where one scale serves all its taps; else unchanged."""
    n, taps, channels = weight.shape
    if weight.scheme.granularity is Granularity.BLOCK:
        return weight
    codes = np.ascontiguousarray(weight.codes.reshape(n, 1, taps * channels))
    return replace(weight, codes=codes)
