"""Float32 contractions on CPUs: the kernels of `targets/kernels/f*.py`, offered to the emitter as rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import InternalError
from kbitc.targets.cpu.rules.quantized import bordered
from kbitc.targets.kernels import fdots
from kbitc.targets.kernels.batch import BatchSpec
from kbitc.targets.kernels.fattention import make_attention
from kbitc.targets.kernels.fbatch import make_fbatch, make_transposed
from kbitc.targets.kernels.fdepthwise import DepthwiseSpec, make_fdepthwise
from kbitc.targets.kernels.fgemm import FgemmSpec, make_fgemm, pack_bias, pack_float
from kbitc.targets.kernels.ftile import registers_of
from kbitc.targets.lower.contraction import Contraction, EmitContext
from kbitc.targets.rules.product import rows_of
from kbitc.targets.rules.weights import cached
from kbitc.targets.target import Target

RelaxExpr = Any
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FloatProduct:
    """Matrix products and convolutions by a float32 weight: `kernels/fgemm.py`."""

    name: str = "float_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul or conv of float activations with a float32 weight."""
        if contraction.kind not in ("matmul", "conv"):
            return f"a {contraction.kind} is not a product with a weight"
        return _float_only(contraction)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Give the activation its border where it has one, then multiply."""
        weight, groups = float_weight(contraction), _groups(contraction)
        func, name = product_kernel(ctx, contraction)
        given = [bordered(ctx, contraction, inputs[0]), *_parameters(ctx, contraction, weight, groups)]
        return ctx.call(func, name, given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class FloatDepthwise:
    """Depthwise convolutions by a float32 weight: `kernels/fdepthwise.py`."""

    name: str = "float_depthwise"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a conv of float activations whose groups have one input and one output channel each."""
        if contraction.conv is None or contraction.weight is None:
            return f"a {contraction.kind} is not a convolution"
        n, _, channels = contraction.weight.shape
        if channels != 1 or contraction.conv.group != n:
            return "a group has more than one input or output channel"
        return _float_only(contraction)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel; the border is never written to memory."""
        weight = float_weight(contraction)
        func, name = depthwise_kernel(ctx, contraction)
        # As one group of N outputs of one channel the packed weight is [tiles, T, 16].
        given = [inputs[0], *_parameters(ctx, contraction, weight, 1)]
        return ctx.call(func, name, given, [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class FloatBatchProduct:
    """Products of two activations: `kernels/fbatch.py`."""

    name: str = "float_batch_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for every batch_matmul."""
        return None if contraction.kind == "batch_matmul" else f"a {contraction.kind} has a weight"

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Few rows meet a transposed second operand where it lies; else its axes are swapped first."""
        a, b = inputs
        b_shape = contraction.b_shape
        if b_shape is None:
            raise InternalError("a product of activations without its second shape", where=contraction.name)
        registers = registers_of(ctx.target)
        *a_lead, rows, channels = contraction.x_shape
        if contraction.transpose_b and fdots.takes(rows, channels):
            out_lead = contraction.out_shape[:-2]
            dots = BatchSpec(tuple(a_lead), tuple(b_shape[:-2]), out_lead, rows, channels, b_shape[-2])
            return _few_dots(ctx, dots, registers.lanes, (a, b))
        if contraction.transpose_b:
            *outer, columns, channels = b_shape
            key = ("transposed", repr(b_shape), repr(registers))
            swap = cached(ctx, key, lambda: make_transposed(outer, columns, channels, registers, "transposed"))
            b_shape = (*outer, channels, columns)
            b = ctx.call(swap, "transposed", [b], [(b_shape, "float32")])
        spec = BatchSpec(tuple(a_lead), tuple(b_shape[:-2]), contraction.out_shape[:-2], rows, channels, b_shape[-1])
        name = "float_batch_product"
        func = cached(ctx, (name, repr(spec), repr(registers)), lambda: make_fbatch(spec, registers, name))
        return ctx.call(func, name, [a, b], [(contraction.out_shape, "float32")])


@dataclass(frozen=True)
class FusedAttention:
    """Attention whose scores stay in a buffer: `kernels/fattention.py`.

    Attributes:
        attention: the emitter puts attention together for the sake of this rule.
    """

    name: str = "fused_attention"
    attention: bool = True

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for every attention."""
        return None if contraction.kind == "attention" else f"a {contraction.kind} is one product"

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel."""
        spec = contraction.attention
        if spec is None:
            raise InternalError("an attention without its description", where=contraction.name)
        registers, name = registers_of(ctx.target), "attention"
        func = cached(ctx, (name, repr(spec), repr(registers)), lambda: make_attention(spec, registers, name))
        return ctx.call(func, name, list(inputs), [(contraction.out_shape, "float32")])


def _few_dots(ctx: EmitContext, spec: BatchSpec, lanes: int, inputs: tuple[RelaxExpr, RelaxExpr]) -> RelaxExpr:
    name = "float_dots"
    func = cached(ctx, (name, repr(spec), str(lanes)), lambda: fdots.make_fdots(spec, lanes, name))
    return ctx.call(func, name, list(inputs), [((*spec.lead, spec.rows, spec.columns), "float32")])


# In order of preference; the reference rule comes after them.
RULES = (FloatDepthwise(), FloatProduct(), FusedAttention(), FloatBatchProduct())


def product_kernel(ctx: EmitContext, contraction: Contraction) -> tuple[Any, str]:
    """The kernel of a matmul or conv by a weight [tiles, T * C, 16], and its name."""
    n, taps, channels = _weight_shape(contraction)
    biased, groups = contraction.bias is not None, _groups(contraction)
    spec = FgemmSpec(rows_of(contraction), channels, n, taps, groups, biased, contraction.post)
    registers = registers_of(ctx.target)
    name = f"float_{contraction.kind}"
    return cached(ctx, (name, repr(spec), repr(registers)), lambda: make_fgemm(spec, registers, name)), name


def depthwise_kernel(ctx: EmitContext, contraction: Contraction) -> tuple[Any, str]:
    """The kernel of a depthwise conv by a weight [tiles, T, 16], and its name."""
    if contraction.conv is None:
        raise InternalError("a convolution without geometry", where=contraction.name)
    batch, height, width, _ = contraction.x_shape
    _, out_height, out_width, _ = contraction.out_shape
    spec = DepthwiseSpec(
        (batch, height, width), (out_height, out_width), _weight_shape(contraction)[0], contraction.conv,
        contraction.bias is not None, contraction.post,
    )  # fmt: skip
    registers = registers_of(ctx.target)
    name = "float_depthwise"
    return cached(ctx, (name, repr(spec), repr(registers)), lambda: make_fdepthwise(spec, registers, name)), name


def _weight_shape(contraction: Contraction) -> tuple[int, int, int]:
    """(N, T, C) of the weight, packed or not."""
    if contraction.weight is None:
        raise InternalError("a product without a weight", where=contraction.name)
    n, taps, channels = contraction.weight.shape
    return n, taps, channels


def _float_only(contraction: Contraction) -> str | None:
    """Why a product with a weight is not for the rules here."""
    if not isinstance(contraction.weight, np.ndarray):
        return "the weight is not float32"
    if contraction.activation != "float32":
        return "the activations are int8"
    return None


def float_weight(contraction: Contraction) -> FloatArray:
    """The weight [N, T, C] of a contraction that a rule here has taken."""
    if not isinstance(contraction.weight, np.ndarray):
        raise InternalError("a rule for float32 weights was given another", where=contraction.name)
    return contraction.weight


def _groups(contraction: Contraction) -> int:
    return 1 if contraction.conv is None else contraction.conv.group


def _parameters(ctx: EmitContext, contraction: Contraction, weight: FloatArray, groups: int) -> list[RelaxExpr]:
    """The packed weight, stored once for all contractions that share it, and the bias."""
    key = ("float weight", id(weight), groups)
    if key not in ctx.memo:
        ctx.memo[key] = (weight, ctx.weight(f"{contraction.name}.weight", pack_float(weight, groups)))
    parameters = [ctx.memo[key][1]]
    if contraction.bias is not None:
        bias = np.asarray(contraction.bias, np.float32)
        parameters.append(ctx.weight(f"{contraction.name}.bias", pack_bias(bias, groups)))
    return parameters
