"""Kernel rules for the contractions of integer graphs on x86 and NEON: uint8 codes by constant levels.

The parameters of a weight are `<name>.levels` (packed k-bit codes), `<name>.factors`, `<name>.bias`,
`<name>.factor`, or `<name>.multiplier`, `<name>.shift` and `<name>.addend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import InternalError
from kbitc.quant.levels import LevelTensor
from kbitc.quant.packing import LANES, UNIT, pack_codes, pack_per_channel
from kbitc.targets.kernels.border import BorderSpec, make_border
from kbitc.targets.kernels.byte_dot import ByteDot, byte_dot, byte_dot_of
from kbitc.targets.kernels.ftile import registers_of
from kbitc.targets.kernels.iattention import make_code_attention
from kbitc.targets.kernels.ibatch import IbatchSpec, make_ibatch, make_pack
from kbitc.targets.kernels.idepthwise import (
    MOST_TAPS,
    SLACK,
    IdepthwiseSpec,
    exact,
    make_idepthwise,
    pack_taps,
    places,
)
from kbitc.targets.kernels.igemm import IgemmSpec, few_tiles, make_igemm, tile_shape
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.kernels.requantize import MOST_SUM, WHOLE, Epilogue, arrays, channel_places, epilogue_of
from kbitc.targets.kernels.rows import ConvRows, unknown_size
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, EmitContext
from kbitc.targets.rules.product import rows_of
from kbitc.targets.rules.weights import cached
from kbitc.targets.target import Target

RelaxExpr = Any
Output = tuple[tuple[Any, ...], str]


@dataclass(frozen=True)
class CodeProduct:
    """Matrix products and convolutions of any groups: `kernels/igemm.py`."""

    name: str = "code_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a matmul or conv of uint8 codes by constant levels."""
        return _levels_only(contraction)

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Give the image its border where it has one, then multiply."""
        isa = isa_of(ctx.target)
        weight, spec, dot = _prepared(contraction, ctx.target)
        name = f"integer_{contraction.kind}"
        found = ctx.target.schedule
        tile = None if found is None else (found.rows, found.tiles, found.few_tiles)
        key = (name, repr(spec), isa.name, dot.chain, tile)
        func = cached(ctx, key, lambda: make_igemm(spec, dot, isa, name, tile))
        x = _bordered(ctx, contraction, inputs[0]) if spec.flat else inputs[0]
        given = [x, *_parameters(ctx, contraction, weight, spec, dot)]
        given += inputs[:1] if spec.flat and unknown_size(spec.rows.source_shape) else []
        return call(ctx, contraction, func, name, given)


@dataclass(frozen=True)
class CodeDepthwise:
    """Depthwise convolutions: `kernels/idepthwise.py`."""

    name: str = "code_depthwise"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a conv of uint8 codes whose groups have one input and one output channel each."""
        reason = _levels_only(contraction)
        if reason is not None:
            return reason
        weight, conv = level_weight(contraction), contraction.conv
        if conv is None or weight.shape[2] != 1 or conv.group != weight.shape[0]:
            return "a group has more than one input or output channel"
        return None if weight.shape[1] <= MOST_TAPS else f"the window has {weight.shape[1]} taps"

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel; the image gets a border first where registers do not cover the channels exactly."""
        weight, rows = level_weight(contraction), rows_of(contraction)
        by_taps = weight.levels().transpose(0, 2, 1)  # four taps of a channel lie in a lane
        dot = byte_dot_of(ctx.target.dot, by_taps)
        if not isinstance(rows, ConvRows) or contraction.conv is None:
            raise InternalError("a depthwise product of no image", where=contraction.name)
        n = weight.shape[0]
        way = _epilogue(contraction, dot)
        image, conv, flat = contraction.x_shape[:3], contraction.conv, not exact(n, dot)
        if flat:
            image, conv = (rows.batch, rows.padded_height, rows.padded_width), replace(conv, pads=(0, 0, 0, 0))
        spec = IdepthwiseSpec(
            image, (rows.out_height, rows.out_width), n, conv, contraction.x_zero, flat, way,
            wants_accumulators(contraction), contraction.conv.pads if flat else (0, 0, 0, 0),
        )  # fmt: skip
        name = "integer_depthwise"
        func = cached(ctx, (name, repr(spec), ctx.target.dot, dot.chain), lambda: make_idepthwise(spec, dot, name))
        runs = places(n, dot)
        at = np.concatenate([run for run, _ in runs])
        given = [
            _bordered(ctx, contraction, inputs[0], SLACK) if flat else inputs[0],
            ctx.weight(f"{contraction.name}.levels", pack_taps(by_taps[:, 0], dot)),
            ctx.weight(f"{contraction.name}.bias", at_places(folded_bias(contraction, dot), at)),
            *epilogue_parameters(ctx, contraction, way, runs),
            *(inputs[:1] if flat and unknown_size(image) else []),
        ]
        return call(ctx, contraction, func, name, given)


@dataclass(frozen=True)
class CodeBatchProduct:
    """Products of two activations: `kernels/ibatch.py`."""

    name: str = "code_batch_product"

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for a batch_matmul of uint8 codes with one requantization for all."""
        if contraction.activation != "uint8" or contraction.kind != "batch_matmul":
            return "it is no product of two operands of uint8 codes"
        many = contraction.requantize is not None and contraction.requantize.multiplier.size > 1
        return "its columns have a bias or numbers of their own" if many or contraction.bias is not None else None

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Pack the second operand, then multiply."""
        dot, b_shape = byte_dot(ctx.target.dot), contraction.b_shape
        if b_shape is None:
            raise InternalError("a product of activations without its second shape", where=contraction.name)
        *a_lead, rows, channels = contraction.x_shape
        most = channels * WHOLE * WHOLE if isinstance(channels, int) else MOST_SUM
        way = None if contraction.requantize is None else epilogue_of(contraction.requantize, dot, most)
        spec = IbatchSpec(
            tuple(a_lead), tuple(b_shape[:-2]), contraction.out_shape[:-2], rows, channels, contraction.out_shape[-1],
            contraction.transpose_b, contraction.x_zero, contraction.b_zero, way, wants_accumulators(contraction),
        )  # fmt: skip
        key = (repr(spec), ctx.target.dot)
        pack = cached(ctx, ("pack_codes", *key), lambda: make_pack(spec, dot, "pack_codes"))
        levels, added = spec.packed_shapes()
        packed = ctx.call(pack, "pack_codes", [inputs[1]], [(levels, "uint8"), (added, "int32")])
        name = "integer_batch_matmul"
        func = cached(ctx, (name, *key), lambda: make_ibatch(spec, dot, name))
        places = np.zeros(LANES, np.int64)
        given = [inputs[0], *packed, *epilogue_parameters(ctx, contraction, way, [(places, dot)])]
        return call(ctx, contraction, func, name, given)


@dataclass(frozen=True)
class CodeAttention:
    """Attention of codes whose scores stay in a buffer: `kernels/iattention.py`.

    Attributes:
        attention: the emitter puts attention together for the sake of this rule.
    """

    name: str = "code_attention"
    attention: bool = True

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None for every attention of codes."""
        fits = contraction.kind == "attention" and contraction.activation == "uint8"
        return None if fits else "it is no attention of codes"

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """One kernel."""
        spec, requantize = contraction.attention, contraction.requantize
        if spec is None or requantize is None:
            raise InternalError("an attention of codes without its description", where=contraction.name)
        registers, dot, name = registers_of(ctx.target), byte_dot(ctx.target.dot), "code_attention"
        most = spec.keys * WHOLE * WHOLE if isinstance(spec.keys, int) else MOST_SUM
        way = epilogue_of(requantize, dot, most)
        key = (name, repr(spec), repr(way), repr(registers), ctx.target.dot)
        func = cached(ctx, key, lambda: make_code_attention(spec, way, registers, dot, name))
        numbers = epilogue_parameters(ctx, contraction, way, [(np.zeros(LANES, np.int64), dot)])
        return ctx.call(func, name, [*inputs, *numbers], [(contraction.out_shape, "uint8")])


# In order of preference; the reference rule comes after them.
RULES = (CodeDepthwise(), CodeProduct(), CodeBatchProduct(), CodeAttention())


def _levels_only(contraction: Contraction) -> str | None:
    """Why a contraction is not one of codes by constant levels."""
    if contraction.activation != "uint8":
        return "the activations are no uint8 codes"
    if not isinstance(contraction.weight, LevelTensor):
        return "the second operand is not constant"
    return None


def call(ctx: EmitContext, contraction: Contraction, func: Any, name: str, given: Sequence[RelaxExpr]) -> RelaxExpr:
    """Call a kernel whose outputs are the result and, where asked for, the accumulators."""
    outputs: list[Output] = [(contraction.out_shape, contraction.out_dtype)]
    if not wants_accumulators(contraction):
        return ctx.call(func, name, given, outputs)
    result, accumulators = ctx.call(func, name, given, [*outputs, (contraction.out_shape, "int32")])
    ctx.debug_output(f"{contraction.name}.accumulators", accumulators)
    return result


def wants_accumulators(contraction: Contraction) -> bool:
    """Whether the accumulators are an output beside the result."""
    return contraction.accumulators_out and contraction.requantize is not None


def level_weight(contraction: Contraction) -> LevelTensor:
    """The weight of a contraction that a rule here has taken."""
    if not isinstance(contraction.weight, LevelTensor):
        raise InternalError("a rule for integer weights was given another", where=contraction.name)
    return contraction.weight


def _epilogue(contraction: Contraction, dot: ByteDot) -> Epilogue | None:
    """How sums of codes by levels become codes; none exceeds |bias| + largest |x - zero| * sum of |level|."""
    if contraction.requantize is None:
        return None
    levels = np.abs(level_weight(contraction).levels().astype(np.int64)).sum(axis=(1, 2))
    most = levels * max(contraction.x_zero, WHOLE - contraction.x_zero)
    if contraction.bias is not None:
        most = most + np.abs(np.asarray(contraction.bias, np.int64))
    return epilogue_of(contraction.requantize, dot, most)


def _prepared(contraction: Contraction, target: Target) -> tuple[LevelTensor, IgemmSpec, ByteDot]:
    """The weight as the kernel sees it, what the kernel computes, and its dot product.

    The taps of a line lie side by side in memory, so a line of taps is one tap of more channels, unless they are
    dilated, or other groups lie between them, or a factor would not cover whole blocks of a line.
    """
    weight, rows = level_weight(contraction), rows_of(contraction)
    conv = contraction.conv
    groups = 1 if conv is None else conv.group
    if weight.factors is not None and weight.block % UNIT:
        weight = weight.whole_bytes()
    n, taps, channels = weight.shape
    pixel = channels * groups
    if isinstance(rows, ConvRows) and conv is not None:
        down, across = conv.kernel
        aligned = weight.factors is None or across == 1
        if aligned and groups == 1 and conv.dilations[1] == 1:
            taps, channels = down, across * channels
            line = ConvAttributes((down, 1), conv.strides, conv.pads, (conv.dilations[0], 1))
            weight, rows = weight.seen_as((n, taps, channels)), replace(rows, attributes=line)
    dot = byte_dot_of(target.dot, weight.grid_levels())
    spec = IgemmSpec(
        rows=rows,
        pixel=pixel,
        channels=channels,
        outputs=n // groups,
        taps=taps,
        groups=groups,
        bits=weight.bits,
        grid=weight.grid,
        block=weight.block,
        epilogue=_epilogue(contraction, dot),
        accumulators=wants_accumulators(contraction),
        flat=conv is not None and any(conv.pads),
    )
    return weight, spec, dot


def usual_tile(contraction: Contraction, target: Target) -> tuple[int, int, int]:
    """Rows and 16-channel tiles of the register tile of a `CodeProduct`, and tiles of that of one row."""
    _, spec, dot = _prepared(contraction, target)
    return (*tile_shape(spec, dot), few_tiles(spec))


def _parameters(
    ctx: EmitContext, contraction: Contraction, weight: LevelTensor, spec: IgemmSpec, dot: ByteDot
) -> list[RelaxExpr]:
    """Packed levels (stored once for all contractions that share them), bias, factors, requantization."""
    name, groups = contraction.name, spec.groups
    key = ("levels", id(contraction.weight), groups, weight.shape)
    if key not in ctx.memo:
        split = np.split(weight.codes, groups)
        packed = np.concatenate([pack_codes(part, weight.bits) for part in split])
        ctx.memo[key] = (contraction.weight, ctx.weight(f"{name}.levels", packed))
    given = [ctx.memo[key][1]]
    places = channel_places(spec.outputs, groups)
    given.append(ctx.weight(f"{name}.bias", at_places(folded_bias(contraction, dot), places)))
    if weight.factors is not None:
        parts = [pack_per_channel(part, spec.outputs) for part in np.split(weight.factors, groups)]
        given.append(ctx.weight(f"{name}.factors", np.concatenate(parts)))
    return [*given, *epilogue_parameters(ctx, contraction, spec.epilogue, [(places, dot)])]


def epilogue_parameters(
    ctx: EmitContext,
    contraction: Contraction,
    way: Epilogue | None,
    runs: Sequence[tuple[npt.NDArray[np.int64], ByteDot]],
) -> list[RelaxExpr]:
    """The numbers of the requantization, none without one; for runs of places, each with its registers."""
    if way is None or contraction.requantize is None:
        return []
    made = [arrays(way, contraction.requantize, places, dot) for places, dot in runs]
    return [ctx.weight(f"{contraction.name}.{part}", np.concatenate([run[part] for run in made])) for part in way.parts]


def folded_bias(contraction: Contraction, dot: ByteDot) -> npt.NDArray[np.int32]:
    """bias - (x_zero + dot.offset) * sum of the levels, int32 [N], modulo 2^32 as the accumulator is."""
    weight = level_weight(contraction)
    sums = weight.levels().astype(np.int64).sum(axis=(1, 2))
    bias = np.zeros(weight.shape[0], np.int64) if contraction.bias is None else np.asarray(contraction.bias, np.int64)
    total = bias - (contraction.x_zero + dot.offset) * sums
    return np.asarray(total.astype(np.uint32).astype(np.int32), np.int32)


def at_places(values: npt.NDArray[np.int32], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The value of the channel at each place, 0 in the padding."""
    return np.where(places < 0, 0, values[np.maximum(places, 0)]).astype(np.int32)


def _bordered(ctx: EmitContext, contraction: Contraction, x: RelaxExpr, slack: int = 0) -> RelaxExpr:
    """The image with its border of zero points, and bytes behind it; once for all its readers."""
    rows, conv = rows_of(contraction), contraction.conv
    if not isinstance(rows, ConvRows) or conv is None:
        raise InternalError("a border of no image", where=contraction.name)
    channels = contraction.x_shape[-1]
    key = ("byte border", hash(x), conv.pads, contraction.x_zero, slack)
    if key not in ctx.memo:
        what = BorderSpec(contraction.x_shape[:3], channels, conv.pads, "uint8", contraction.x_zero, slack)
        func = cached(ctx, ("byte_border", repr(what)), lambda: make_border(what, "byte_border"))
        size = rows.batch * rows.padded_height * rows.padded_width * channels + slack
        # The variable is kept so that its hash, its identity in TVM, stays its own.
        ctx.memo[key] = (x, ctx.call(func, "byte_border", [x], [((size,), "uint8")]))
    return ctx.memo[key][1]
