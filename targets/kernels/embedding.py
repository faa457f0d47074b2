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

from kbitc.quant.format import Format
from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT, packed_shape
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.isa import stored_bias

Expr = Any
Buffer = Any
Dim = Any


@dataclass(frozen=True)
class EmbeddingSpec:
    """A look-up of rows.

    Attributes:
        lead: shape of the indices.
        rows, channels: N and C of the table [N, 1, C].
        data_type: format of the codes.
        block: channels per scale; C when there is one scale a row.
        scale_dtype: "float16" or "float32".
        zero_point: zero points are stored beside the scales.
        index_dtype: "int32" or "int64".
    """

    lead: tuple[Dim, ...]
    rows: int
    channels: int
    data_type: Format
    block: int
    scale_dtype: str
    zero_point: bool
    index_dtype: str


@dataclass
class _Arguments:
    indices: Buffer
    packed: Buffer
    scales: Buffer
    zeros: Buffer | None
    levels: Buffer | None
    out: Buffer


def make_embedding(spec: EmbeddingSpec, name: str) -> Any:
    """The PrimFunc: indices [*lead], packed, scales [Np/16, 1, CB, 16], zero points (if any), levels, out.

    levels is f32 [2^k], given only for formats that are not uniform; out is f32 [*lead, C].
    """
    return v.kernel(name, lambda: _emit(spec))


def _emit(spec: EmbeddingSpec) -> None:
    dims = v.DimVars()
    lead = tuple(dims(d) for d in spec.lead)
    count = v.product(lead)
    bits = spec.data_type.bits
    packed_dims = packed_shape(spec.rows, 1, spec.channels, bits)
    scale_dims = (packed_dims[0], 1, -(-spec.channels // spec.block), LANES)
    indices = v.argument("indices", lead, spec.index_dtype)
    packed = v.argument("packed", packed_dims, "uint8")
    scales = v.argument("scales", scale_dims, spec.scale_dtype)
    zeros = v.argument("zeros", scale_dims, "uint8") if spec.zero_point else None
    levels = None if spec.data_type.uniform else v.argument("levels", (2**bits,), "float32")
    out = v.argument("out", (*lead, spec.channels), "float32")
    with v.root():
        flat = v.view(indices, (count,), spec.index_dtype)
        result = v.view(out, (count, spec.channels), "float32")
        args = _Arguments(flat, packed, scales, zeros, levels, result)
        with builder.parallel(v.i64(0), v.i64(count)) as i:
            asked = v.bind(v.cast(flat[i], "int64", 1))
            wrapped = tirx.Select(asked < v.i64(0), asked + spec.rows, asked)
            row = v.bind(tirx.max(tirx.min(v.bind(wrapped), v.i64(spec.rows - 1)), v.i64(0)))
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
            lambda k: v.reinterpret(v.load(args.packed, [tile, 0, u, k, lane * GROUP], GROUP), "uint32", 1),
        )
        for h, count in enumerate(counts):
            if not count:
                continue
            start = v.bind(u * UNIT + h * half)
            block = v.bind(tirx.truncdiv(start, v.i64(spec.block)))
            scale = v.bind(v.cast(args.scales[tile, v.i64(0), block, lane], "float32", 1))
            zero = _zero(spec, args, tile, lane, block)
            for step in range(-(-count // GROUP)):
                levels = _levels(spec, args, codes, h * (STEPS // 2) + step)
                value = (levels - v.splat(zero, GROUP)) * v.splat(scale, GROUP)
                kept = min(GROUP, count - step * GROUP)
                v.store_first(args.out, [i, start + step * GROUP], v.bind(value), GROUP, kept)

    v.loop(whole, lambda u: unit(u, (half, half)))
    if rest:
        unit(v.i64(whole), (min(rest, half), max(0, rest - half)))


def _zero(spec: EmbeddingSpec, args: _Arguments, tile: Expr, lane: Expr, block: Expr) -> Expr:
    """The level of the zero point, f32; levels are small integers, so the subtraction is exact."""
    if args.zeros is None:
        return tirx.const(0.0, "float32")
    stored = v.cast(args.zeros[tile, v.i64(0), block, lane], "int32", 1)
    return v.bind(v.cast(stored - tirx.const(stored_bias(spec.data_type), "int32"), "float32", 1))


def _levels(spec: EmbeddingSpec, args: _Arguments, unit: UnitCodes, step: int) -> Expr:
    """The levels of the four channels of a step, f32x4."""
    codes = v.reinterpret(v.bind(unit.step(step)), "uint8", GROUP)
    integers = v.bind(v.cast(codes, "int32", GROUP))
    if args.levels is not None:
        return v.bind(args.levels[v.cast(integers, "int64", GROUP)])
    return v.bind(v.cast(integers + v.full(spec.data_type.levels[0], "int32", GROUP), "float32", GROUP))
