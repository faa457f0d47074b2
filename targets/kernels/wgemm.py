"""Weight-only matrix product: float activations by packed k-bit weights of one tap.

    out[m, n] = sum over channels c, in order, of x[m, c] * w[n, c]         float32
    w[n, c] = f32(grid[code] - grid[zero_point]) * scale[n, block of c]
    w[n, c] = f32(code) * scale[n, block of c] + offset[n, block of c]             with offsets

A weight is dequantized in registers to the very float32 that ONNX DequantizeLinear gives (the scale is multiplied
in before the sum, not after a block), and then used by all rows of the register tile. Each product and sum may be
one fused multiply-add; code * scale is exact (`kbitc.quant.scales.round_scales`), so that this changes no weight.
Every (m, n) is summed by one thread in one order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.isa import Isa, feed_of, level_bytes, stored_bias, unit_codes
from kbitc.targets.kernels.packed import WeightArguments, WeightSpec, declare_bias, declare_weight
from kbitc.targets.kernels.rows import MatmulRows
from kbitc.targets.kernels.tasks import clamp, row_tasks, store_channels
from kbitc.targets.lower.contraction import PostFunction

Expr = Any
Buffer = Any


@dataclass(frozen=True, kw_only=True)
class WgemmSpec(WeightSpec):
    """What a kernel computes: the weight, whose T is 1, and `rows`, `bias` and `post` as in `QgemmSpec`."""

    rows: MatmulRows
    bias: bool = False
    post: PostFunction | None = None


@dataclass(frozen=True)
class Factors:
    """What turns the fed bytes of one block into weights: f32(fed - zero) * scale + offset, vectors of channels.

    zero is int32; offset is None where the scheme has none.
    """

    zero: Expr
    scale: Expr
    offset: Expr | None


class Decoder:
    """Turns packed codes into float32 weights, one vector of output channels at a time."""

    def __init__(self, spec: WeightSpec, isa: Isa, args: WeightArguments) -> None:
        self.spec = spec
        self.isa = isa
        self.args = args
        self.feed = feed_of(spec.data_type, signed=False)
        self.table: list[Expr] | None = None

    def prepare(self) -> None:
        """Load what all look-ups share; once in each scope."""
        self.table = None if self.feed.table is None else [v.bind(part) for part in self.isa.table(self.feed.table)]

    def factors(self, tile: Expr, tap: Expr, block: Expr, part: int) -> Factors:
        """Those of one block."""
        place = (tap, block) if self.spec.scale_per_block else (v.i64(0), v.i64(0))
        where = [tile, *place, part * self.isa.lanes]
        scale = self._floats(self.args.scales, where)
        offset = None if self.args.offsets is None else self._floats(self.args.offsets, where)
        return Factors(self._zero(where), scale, offset)

    def _floats(self, buffer: Buffer, where: list[Expr]) -> Expr:
        stored = v.load(buffer, where, self.isa.lanes)
        return v.bind(self.isa.widen(stored) if self.spec.scale_dtype == "float16" else stored)

    def _zero(self, where: list[Expr]) -> Expr:
        lanes = self.isa.lanes
        if self.args.zeros is None:
            return v.full(self.feed.bias + self.spec.origin, "int32", lanes)
        stored = v.load(self.args.zeros, where, lanes)
        shift = stored_bias(self.spec.data_type) - self.feed.bias
        return v.bind(v.cast(stored, "int32", lanes) - v.full(shift, "int32", lanes))

    def codes(self, tile: Expr, tap: Expr, unit: Expr, part: int) -> UnitCodes:
        """The codes of a unit."""
        return unit_codes(self.isa, self.spec.data_type.bits, self.args.packed, [tile, tap, unit], part)

    def fed(self, codes: UnitCodes, step: int) -> Expr:
        """The fed bytes of a step as an int32 vector: byte j of lane n is channel 4 * step + j of output n."""
        found = v.bind(level_bytes(self.isa, self.feed, self.table, codes, step))
        return v.bind(v.reinterpret(found, "uint32", self.isa.lanes))

    def weight(self, fed: Expr, j: int, factors: Factors) -> Expr:
        """The float32 weights of channel j of a step."""
        lanes = self.isa.lanes
        if j:
            fed = tirx.shift_right(fed, v.full(8 * j, "uint32", lanes))
        if j < GROUP - 1:
            fed = fed & v.full(0xFF, "uint32", lanes)
        level = v.reinterpret(fed, "int32", lanes) - factors.zero
        value = v.bind(v.cast(level, "float32", lanes) * factors.scale)
        return value if factors.offset is None else v.bind(value + factors.offset)


@dataclass
class _Tile:
    """One register tile: its rows, first 16-channel tile, sums by (row, tile, part)."""

    rows: list[Expr]
    first: Expr
    tiles: int
    sums: dict[tuple[int, int, int], Buffer] = field(default_factory=dict)


def make_wgemm(spec: WgemmSpec, isa: Isa, name: str) -> Any:
    """The PrimFunc: x f32 [*rows, C], the arguments of the weight, bias f32 [Np] (if any), out f32 [*rows, N]."""
    return v.kernel(name, lambda: _Generator(spec, isa).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: WgemmSpec, isa: Isa) -> None:
        self.spec = spec
        self.isa = isa

    def emit(self) -> None:
        """Arguments, then statements."""
        spec = self.spec
        rows = spec.rows.with_dims(v.DimVars())
        x = v.argument("x", (*rows.source_shape, spec.channels), "float32")
        weight = declare_weight(spec)
        self.bias = declare_bias(spec, spec.bias)
        out = v.argument("out", (*rows.out_shape, spec.outputs), "float32")
        with v.root():
            self.x = v.view(x, (rows.count, spec.channels), "float32")
            self.out = v.view(out, (rows.count, spec.outputs), "float32")
            self.decoder = Decoder(spec, self.isa, weight)
            shape = self.isa.rows, self.isa.tiles
            row_tasks(rows.count, shape, self.isa.vector_tiles, spec.output_tiles, self._tile, rows.least)

    def _tile(self, row: Expr, rows: int, first: Expr, tiles: int) -> None:
        """One register tile from zero to its results in memory."""
        self.decoder.prepare()
        tile = _Tile([v.bind(row + r) for r in range(rows)], first, tiles)
        lanes = self.isa.lanes
        for key in self._keys(tile):
            tile.sums[key] = v.register(lanes, "float32")
            v.put(tile.sums[key], v.full(0.0, "float32", lanes), lanes)
        self._units(tile)
        for r, i, p in self._keys(tile):
            value = v.get(tile.sums[r, i, p], lanes)
            start = (tile.first + i) * LANES + p * lanes
            if self.bias is not None:
                value = value + v.load(self.bias, [start], lanes)
            value = v.bind(clamp(v.bind(value), self.spec.post, lanes))
            store_channels(self.out, [tile.rows[r]], tile.first + i, p, value, self.spec.outputs, lanes)

    def _keys(self, tile: _Tile) -> list[tuple[int, int, int]]:
        return [(r, i, p) for r in range(len(tile.rows)) for i in range(tile.tiles) for p in range(self.isa.parts)]

    def _units(self, tile: _Tile) -> None:
        """Half units in order, so that every block is whole half units whatever its size."""
        half = UNIT // 2
        whole, rest = divmod(self.spec.channels, UNIT)
        v.loop(whole, lambda unit: self._unit(tile, unit, (half, half)))
        if rest:
            self._unit(tile, v.i64(whole), (min(rest, half), max(0, rest - half)))

    def _unit(self, tile: _Tile, unit: Expr, counts: tuple[int, int]) -> None:
        """One unit, of whose halves `counts` channels are real."""
        half, block, tap = UNIT // 2, self.spec.block, v.i64(0)
        for i in range(tile.tiles):
            for p in range(self.isa.parts):
                codes = self.decoder.codes(tile.first + i, tap, unit, p)
                for h, count in enumerate(counts):
                    if not count:
                        continue
                    start = unit * UNIT + h * half
                    at = v.bind(tirx.truncdiv(start, v.i64(block)))
                    factors = self.decoder.factors(tile.first + i, tap, at, p)
                    self._half(tile, (i, p), codes, (h, count, start), factors)

    def _half(
        self,
        tile: _Tile,
        key: tuple[int, int],
        codes: UnitCodes,
        place: tuple[int, int, Expr],
        factors: Factors,
    ) -> None:
        """Up to 16 channels that share a scale, for one vector of output channels and all rows."""
        lanes = self.isa.lanes
        half, count, start = place
        sums = [v.get(tile.sums[r, *key], lanes) for r in range(len(tile.rows))]
        for c in range(count):
            if c % GROUP == 0:
                fed = self.decoder.fed(codes, half * (STEPS // 2) + c // GROUP)
            weight = self.decoder.weight(fed, c % GROUP, factors)
            for r, row in enumerate(tile.rows):
                sums[r] = v.bind(sums[r] + v.splat(self.x[row, start + c], lanes) * weight)
        for r, value in enumerate(sums):
            v.put(tile.sums[r, *key], value, lanes)
