"""Rows of a packed k-bit table by index: indices [...] -> f32 [..., C], the float32 of ONNX DequantizeLinear.

Row n lies in lane n mod 16 of tile n // 16: k words of 32 bits for every 32 channels. Byte j of a word holds the
fields of channels 4 s + j. Negative indices count from the end, as in ONNX Gather; indices outside [-N, N - 1],
which ONNX forbids, read the nearest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.isa import stored_bias
from kbitc.targets.kernels.packed import WeightArguments, WeightSpec, declare_weight

Expr = Any
Buffer = Any
Dim = Any


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec(WeightSpec):
    """A look-up of rows in a table [N, 1, C].

    Attributes:
        lead: shape of the indices.
        index_dtype: "int32" or "int64".
    """

    lead: tuple[Dim, ...]
    index_dtype: str


@dataclass
class _Arguments:
    indices: Buffer
    weight: WeightArguments
    levels: Buffer | None
    out: Buffer


def make_embedding(spec: EmbeddingSpec, name: str) -> Any:
    """The PrimFunc: indices [*lead], packed, scales [Np/16, 1, CB, 16], zero points or offsets (if any), levels, out.

    levels is f32 [2^k], given only for formats that are not uniform; out is f32 [*lead, C].
    """
    return v.kernel(name, lambda: _emit(spec))


def _emit(spec: EmbeddingSpec) -> None:
    dims = v.DimVars()
    lead = tuple(dims(d) for d in spec.lead)
    count = v.product(lead)
    bits = spec.data_type.bits
    indices = v.argument("indices", lead, spec.index_dtype)
    weight = declare_weight(spec)
    levels = None if spec.data_type.uniform else v.argument("levels", (2**bits,), "float32")
    out = v.argument("out", (*lead, spec.channels), "float32")
    with v.root():
        flat = v.view(indices, (count,), spec.index_dtype)
        result = v.view(out, (count, spec.channels), "float32")
        args = _Arguments(flat, weight, levels, result)
        with builder.parallel(v.i64(0), v.i64(count)) as i:
            asked = v.bind(v.cast(flat[i], "int64", 1))
            wrapped = tirx.Select(asked < v.i64(0), asked + spec.outputs, asked)
            row = v.bind(tirx.max(tirx.min(v.bind(wrapped), v.i64(spec.outputs - 1)), v.i64(0)))
            _row(spec, args, i, row)


def _row(spec: EmbeddingSpec, args: _Arguments, i: Expr, row: Expr) -> None:
    """All channels of one row, a half unit at a time so that each has one scale."""
    tile = v.bind(tirx.truncdiv(row, v.i64(LANES)))
    lane = v.bind(tirx.truncmod(row, v.i64(LANES)))
    whole, rest = divmod(spec.channels, UNIT)
    half = UNIT // 2

    def unit(u: Expr, counts: tuple[int, int]) -> None:
        codes = UnitCodes(
            spec.data_type.bits,
            lambda k: v.reinterpret(v.load(args.weight.packed, [tile, 0, u, k, lane * GROUP], GROUP), "uint32", 1),
        )
        for h, count in enumerate(counts):
            if not count:
                continue
            start = v.bind(u * UNIT + h * half)
            block = v.bind(tirx.truncdiv(start, v.i64(spec.block)))
            scale = v.bind(v.cast(args.weight.scales[tile, v.i64(0), block, lane], "float32", 1))
            zero = _zero(spec, args, tile, lane, block)
            offset = None
            if args.weight.offsets is not None:
                offset = v.bind(v.cast(args.weight.offsets[tile, v.i64(0), block, lane], "float32", 1))
            for step in range(-(-count // GROUP)):
                levels = _levels(spec, args, codes, h * (STEPS // 2) + step)
                value = (levels - v.splat(zero, GROUP)) * v.splat(scale, GROUP)
                if offset is not None:
                    value = v.bind(value) + v.splat(offset, GROUP)
                kept = min(GROUP, count - step * GROUP)
                v.store_first(args.out, [i, start + step * GROUP], v.bind(value), GROUP, kept)

    v.loop(whole, lambda u: unit(u, (half, half)))
    if rest:
        unit(v.i64(whole), (min(rest, half), max(0, rest - half)))


def _zero(spec: EmbeddingSpec, args: _Arguments, tile: Expr, lane: Expr, block: Expr) -> Expr:
    """The level of the zero point, or the lowest, f32; levels are small integers, so the subtraction is exact."""
    if args.weight.zeros is None:
        return tirx.const(float(spec.origin), "float32")
    stored = v.cast(args.weight.zeros[tile, v.i64(0), block, lane], "int32", 1)
    return v.bind(v.cast(stored - tirx.const(stored_bias(spec.data_type), "int32"), "float32", 1))


def _levels(spec: EmbeddingSpec, args: _Arguments, unit: UnitCodes, step: int) -> Expr:
    """The levels of the four channels of a step, f32x4."""
    codes = v.reinterpret(v.bind(unit.step(step)), "uint8", GROUP)
    integers = v.bind(v.cast(codes, "int32", GROUP))
    if args.levels is not None:
        return v.bind(args.levels[v.cast(integers, "int64", GROUP)])
    return v.bind(v.cast(integers + v.full(spec.data_type.levels[0], "int32", GROUP), "float32", GROUP))
