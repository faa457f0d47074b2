"""Integer matrix product and convolution on tensor cores: int8 activations by packed k-bit weights.

The specification, arguments and float order are those of kernels/qgemm.py for CPUs. A warp owns a tile of rows and
channels and walks taps, blocks and units in order, so the float sums have the CPU's order. Weights go from memory to
mma operands in registers: the lane that holds column `group`, member `member` of B needs just its own words of a unit,
because the steps of a unit may be dealt to members in any order as long as the activations follow.
With blocks of whole units member i takes steps 2i and 2i + 1 (one mma m16n8k32 a unit); with other multiples of 16
it takes step 4 * half + i (one mma m16n8k16 a half unit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, UNIT
from kbitc.targets.cuda.intrin import mma
from kbitc.targets.cuda.kernels import levels
from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.cuda.kernels.arguments import Arguments, declared, finish_value
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.qgemm import QgemmSpec

Expr = Any
Buffer = Any
HALF_UNIT = UNIT // 2
WORDS = UNIT // GROUP
UNROLLED_UNITS = 4
WARPS = 4


@dataclass(frozen=True)
class Tiling:
    """How a thread block of four warps covers the output.

    Attributes:
        row_tiles: 16-row mma tiles of a warp; channel_tiles: 16-channel weight tiles of a warp.
        warps_down: warps along rows; the others lie along channels.
    """

    row_tiles: int
    channel_tiles: int
    warps_down: int

    @property
    def warp_rows(self) -> int:
        """Rows of a warp."""
        return self.row_tiles * mma.ROWS

    @property
    def block_rows(self) -> int:
        """Rows of a thread block."""
        return self.warp_rows * self.warps_down

    @property
    def block_tiles(self) -> int:
        """16-channel tiles of a thread block."""
        return self.channel_tiles * (WARPS // self.warps_down)


def choose_tiling(rows: Any) -> Tiling:
    """Few rows: all warps along channels; many or unknown: a square of 64 by 64."""
    if isinstance(rows, int) and rows <= mma.ROWS:
        return Tiling(1, 1, 1)
    if isinstance(rows, int) and rows <= 2 * mma.ROWS:
        return Tiling(2, 1, 1)
    return Tiling(2, 2, 2)


def make_qgemm(spec: QgemmSpec, name: str, tiling: Tiling | None = None) -> Any:
    """The PrimFunc; arguments as `kernels.qgemm.make_qgemm` of the CPU targets has them."""

    def body() -> None:
        with declared(spec) as args:
            emit_qgemm(spec, args, tiling)

    return v.kernel(name, body)


def emit_qgemm(spec: QgemmSpec, args: Arguments, tiling: Tiling | None = None) -> None:
    """Emit the launch of the kernel into the open function."""
    shape = tiling or choose_tiling(args.rows.count)
    rows, tiles = args.rows.count, spec.output_tiles
    grid = (t.divide_round_up(rows, shape.block_rows), t.divide_round_up(tiles, shape.block_tiles))
    with t.launch(grid, WARPS * t.WARP) as ((down, across), thread):
        _Warp(spec, args, shape, down, across, thread).emit()


class _Warp:
    """Emits what a thread does."""

    def __init__(self, spec: QgemmSpec, args: Arguments, shape: Tiling, down: Expr, across: Expr, thread: Expr) -> None:
        self.spec, self.args, self.shape = spec, args, shape
        self.feed = levels.feed_of(spec.data_type)
        warp, lane = v.bind(thread // t.WARP), v.bind(thread % t.WARP)
        self.group, self.member = v.bind(lane // GROUP), v.bind(lane % GROUP)
        count = args.rows.count
        first_row = down * shape.block_rows + (warp % shape.warps_down) * shape.warp_rows
        # Rows of a thread: group and group + 8 of every row tile. Rows past the end read the last one.
        self.out_rows = [v.bind(first_row + (i * 8) + self.group) for i in range(2 * shape.row_tiles)]
        self.base = [v.bind(args.rows.base(v.bind(t.at_most(row, count - 1)))) for row in self.out_rows]
        self.first_tile = v.bind(across * shape.block_tiles + (warp // shape.warps_down) * shape.channel_tiles)
        last = spec.output_tiles - 1
        self.tiles = [v.bind(t.at_most(self.first_tile + j, last)) for j in range(shape.channel_tiles)]
        self.columns = 2 * shape.channel_tiles
        blocks = spec.blocks
        packed_shape = (spec.output_tiles * spec.taps, spec.padded_channels // UNIT, spec.data_type.bits, LANES)
        self.packed = t.view(args.packed, packed_shape, "uint32")
        self.codes = t.view(args.codes, (args.rows.source_rows, spec.padded_channels // GROUP), "uint32")
        self.blocks = blocks

    def emit(self) -> None:
        """Sums to zero, taps and blocks in order, then the results."""
        tiles = self.shape.row_tiles * self.columns
        self.sums, self.acc = t.local(GROUP * tiles, "float32"), t.local(GROUP * tiles, "int32")
        for i in range(GROUP * tiles):
            v.store(self.sums, [i], tirx.const(0.0, "float32"), 1)
        v.loop(self.spec.taps, self._tap)
        for i in range(self.shape.row_tiles):
            for j in range(self.columns):
                for e in range(GROUP):
                    self._finish(i, j, e)

    def _tap(self, tap: Expr) -> None:
        spec = self.spec
        offset = self.args.rows.tap_offset(tap)
        source = [v.bind(base + offset) for base in self.base]
        whole, rest = divmod(spec.channels, spec.block)
        v.loop(whole, lambda block: self._block(tap, source, block, spec.block))
        if rest:
            self._block(tap, source, v.i64(whole), rest)

    def _block(self, tap: Expr, source: list[Expr], block: Expr, channels: int) -> None:
        """One block: products in int32, then scaled into the float sums."""
        for i in range(self.shape.row_tiles):
            starts = [self._start(source[2 * i + h], block) for h in range(2)]
            for j in range(self.columns):
                for e in range(GROUP):
                    v.store(self.acc, [self._at(i, j, e)], starts[e // 2], 1)
        halves = -(-channels // HALF_UNIT)
        if self.spec.block % UNIT == 0:
            first, units = v.bind(block * (self.spec.block // UNIT)), -(-halves // 2)
            self._repeat(units, lambda u: self._unit(tap, source, v.bind(first + u)))
        else:
            first = v.bind(block * (self.spec.block // HALF_UNIT))
            self._repeat(halves, lambda h: self._half_unit(tap, source, v.bind(first + h)))
        self._scale(tap, source, block)

    def _repeat(self, count: int, body: Any) -> None:
        if count > UNROLLED_UNITS:
            v.loop(count, body)
            return
        for i in range(count):
            body(v.i64(i))

    def _at(self, i: int, j: int, e: int) -> int:
        return GROUP * (i * self.columns + j) + e

    def _start(self, row: Expr, block: Expr) -> Expr:
        """-bias * sum(q), or 0 where zero points take its place."""
        bias = self.feed.bias + self.spec.origin
        if self.spec.zero_point or bias == 0:
            return tirx.const(0, "int32")
        return v.bind(self.args.sums[row, block] * tirx.const(-bias, "int32"))

    def _unit_codes(self, tap: Expr, unit: Expr, j: int) -> UnitCodes:
        """The codes of a unit for this thread's column of channel tile pair j."""
        tile, lane = self.tiles[j // 2], self.group + 8 * (j % 2)
        row = tile * self.spec.taps + tap
        return UnitCodes(self.spec.data_type.bits, lambda vector: self.packed[row, unit, v.i64(vector), lane])

    def _unit(self, tap: Expr, source: list[Expr], unit: Expr) -> None:
        """32 channels: m16n8k32."""
        a = []
        for row in source:
            pair = t.local(2, "uint32")
            v.store(pair, [0], v.load(self.codes, [row, unit * WORDS + 2 * self.member], 2), 2)
            a.append(pair)
        for j in range(self.columns):
            b = levels.step_pair(self.spec.data_type, self._unit_codes(tap, unit, j), self.member)
            for i in range(self.shape.row_tiles):
                top, bottom = a[2 * i], a[2 * i + 1]
                words = [top[0], bottom[0], top[1], bottom[1]]
                builder.evaluate(mma.mma_k32(self.acc, self._at(i, j, 0), words, list(b)))

    def _half_unit(self, tap: Expr, source: list[Expr], half: Expr) -> None:
        """16 channels: m16n8k16."""
        unit, step = v.bind(half // 2), v.bind((half % 2) * GROUP + self.member)
        a = [v.bind(self.codes[row, half * GROUP + self.member]) for row in source]
        for j in range(self.columns):
            b = levels.one_step(self.spec.data_type, self._unit_codes(tap, unit, j), step)
            for i in range(self.shape.row_tiles):
                builder.evaluate(mma.mma_k16(self.acc, self._at(i, j, 0), [a[2 * i], a[2 * i + 1]], [b]))

    def _scale(self, tap: Expr, source: list[Expr], block: Expr) -> None:
        """Take zero points off, multiply by the scales, add; then what offsets add."""
        spec, args = self.spec, self.args
        act = [v.bind(args.act_scales[row, v.i64(0) if spec.row_scales else block]) for row in source]
        shifted = spec.zero_point or spec.offset
        sums = [v.bind(args.sums[row, block]) for row in source] if shifted else []
        summed = [v.bind(tirx.Cast("float32", s) * a) for s, a in zip(sums, act, strict=True)] if spec.offset else []
        at = (tap, block) if spec.scale_per_block else (v.i64(0), v.i64(0))
        for j in range(self.columns):
            lane = 2 * self.member + 8 * (j % 2)
            where = [self.tiles[j // 2], *at]
            weight = [v.bind(tirx.Cast("float32", args.scales[(*where, lane + e)])) for e in range(2)]
            zero = [v.bind(args.zero_level(where, lane + e)) for e in range(2)] if spec.zero_point else None
            offset: list[Expr] = []
            if args.offsets is not None:
                offset = [v.bind(tirx.Cast("float32", args.offsets[(*where, lane + e)])) for e in range(2)]
            for i in range(self.shape.row_tiles):
                for e in range(GROUP):
                    row, column = 2 * i + e // 2, e % 2
                    exact = self.acc[self._at(i, j, e)]
                    if zero is not None:
                        exact = v.bind(exact - zero[column] * sums[row])
                    if args.accumulators is not None:
                        self._store(args.accumulators, (tap * self.blocks + block,), i, j, e, exact)
                    product = tirx.Cast("float32", exact) * (act[row] * weight[column])
                    place = self._at(i, j, e)
                    v.store(self.sums, [place], self.sums[place] + product, 1)
                    if offset:
                        v.store(self.sums, [place], self.sums[place] + summed[row] * offset[column], 1)

    def _channel(self, j: int, e: int) -> Expr:
        return (self.first_tile + j // 2) * LANES + 8 * (j % 2) + 2 * self.member + e % 2

    def _store(self, buffer: Buffer, middle: tuple[Expr, ...], i: int, j: int, e: int, value: Expr) -> None:
        """Store one element if it is a real row and channel."""
        row, channel = self.out_rows[2 * i + e // 2], self._channel(j, e)
        real = tirx.all(row < v.i64(self.args.rows.count), channel < v.i64(self.spec.outputs))
        v.when(real, lambda: v.store(buffer, [row, *middle, channel], value, 1))

    def _finish(self, i: int, j: int, e: int) -> None:
        channel = t.at_most(self._channel(j, e), self.spec.outputs - 1)
        value = finish_value(self.args, self.spec, self.sums[self._at(i, j, e)], channel)
        self._store(self.args.out, (), i, j, e, value)
