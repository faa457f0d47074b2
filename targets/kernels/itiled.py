"""The product of `igemm.py` for many rows on AMX tiles: uint8 codes by int8 levels, one exact sum from the bias on.

Factors are multiplied into the levels: level times factor fits int8 (`LevelTensor.levels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx

from kbitc.quant.levels import WHOLE_BYTES
from kbitc.quant.packing import LANES, STEPS, UNIT, VECTOR_BYTES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Feed, Isa, level_bytes, signed_levels, unit_codes
from kbitc.targets.kernels.tiled import Lines, Reduction, Tiled, TilePart, lines_of
from kbitc.targets.x86.intrin import tiles

if TYPE_CHECKING:
    from kbitc.targets.kernels.igemm import IgemmSpec

Expr = Any
Buffer = Any
# (rows of the output, group, first tile, tiles, sums by (row, tile, register)) -> results in memory
Finish = Callable[[list[Expr], Expr, Expr, int, dict[tuple[int, int, int], Buffer]], None]
# Fewer rows are left to dot products: by the count of instructions (docs/amx.md) tiles gain from here on.
LEAST_ROWS = 8
# Rows whose results are made together, so that the numbers of requantizing are loaded once for them.
FINISHED_ROWS = 4


@dataclass(frozen=True)
class LevelArguments:
    """The buffers of the kernel: bytes of the activation, packed levels, bias, factors; and its number of rows."""

    x: Buffer
    packed: Buffer
    bias: Buffer
    factors: Buffer | None
    rows: Any


def signed_feed(spec: IgemmSpec) -> tuple[Feed, int]:
    """How codes become level bytes, and what is added to each byte after that (0: nothing)."""
    return (Feed(bias=0), 0) if spec.bits == WHOLE_BYTES else signed_levels(spec.grid)


def reduction(spec: IgemmSpec) -> Reduction:
    """One span of all channels; a pixel is followed by bytes of others."""
    return Reduction(spec.channels, spec.channels, spec.channels)


def takes(spec: IgemmSpec, isa: Isa) -> bool:
    """Whether tiles compute the product, at least when its rows turn out to be many."""
    count = spec.rows.count
    if not isa.tile_registers or spec.groups > 1 or (isinstance(count, int) and count < LEAST_ROWS):
        return False
    return lines_of(spec.rows, spec.pixel) is not None and reduction(spec).possible


class ITiled(Tiled):
    """A product on tiles.

    Args:
        spec: one that `takes` takes.
        isa: of the vectors.
        args: buffers.
        lines: of the rows.
        finish: stores results.
    """

    def __init__(self, spec: IgemmSpec, isa: Isa, args: LevelArguments, lines: Lines, finish: Finish) -> None:
        self.spec = spec
        self.isa = isa
        self.args = args
        self.finish = finish
        self.feed, self.plus = signed_feed(spec)
        self.table: list[Expr] | None = None
        self.rows, self.output_tiles, self.taps = args.rows, spec.tiles, spec.taps
        self.reduction, self.lines = reduction(spec), lines
        self.activations, self.one_sum = args.x, True
        self.left_signed, self.right_signed = False, True
        whole = spec.bits == WHOLE_BYTES and not spec.block
        if whole and self.reduction.panel_rows == self.reduction.decoded_rows:
            self.ready = args.packed

    def prepare(self) -> None:
        """See `Tiled.prepare`."""
        table = self.feed.table
        self.table = None if table is None else [v.bind(part) for part in self.isa.table(table)]

    def decode(self, tile: Expr, tap: Expr, unit: Expr) -> list[Expr]:
        """See `Tiled.decode`."""
        spec = self.spec
        codes = unit_codes(self.isa, spec.bits, self.args.packed, [tile, tap, unit], 0)
        factors = None
        if spec.block:
            block = v.bind(tirx.truncdiv(unit * UNIT, v.i64(spec.block)))
            factors = v.bind(v.cast(v.load(self.args.factors, [tile, tap, block, 0], LANES), "int32", LANES))
        made = []
        for step in range(STEPS):
            levels = level_bytes(self.isa, self.feed, self.table, codes, step)
            if self.plus:
                levels = levels + v.full(self.plus % 256, "uint8", VECTOR_BYTES)
            levels = v.bind(levels)
            made.append(levels if factors is None else v.bind(times(levels, factors)))
        return made

    def begin(self, part: TilePart) -> None:
        """All rows of the sums are the bias: loaded with no distance between rows."""
        for half, i in part.pairs:
            place = tiles.address(self.args.bias, (part.first + i) * LANES)
            tiles.load(2 * half + i, place, 0)

    def fold(self, part: TilePart, tap: Expr, block: Expr) -> None:
        """Not called: there is one sum."""

    def end(self, part: TilePart) -> None:
        """Requantize and store some rows at a time."""

        def rows(start: Expr, count: int) -> None:
            keys = [(r, i, 0) for r in range(count) for i in range(part.tiles)]
            sums = {key: v.register(LANES, "int32") for key in keys}
            for (r, i, _), held in sums.items():
                v.put(held, part.load(start + r, i, "int32", total=False), LANES)
            out_rows = [v.bind(part.row + start + r) for r in range(count)]
            self.finish(out_rows, v.i64(0), part.first, part.tiles, sums)

        count = part.count
        whole = count // FINISHED_ROWS if isinstance(count, int) else v.bind(
            tirx.truncdiv(count, v.i64(FINISHED_ROWS)))  # fmt: skip
        v.loop(whole, lambda i: rows(v.bind(i * FINISHED_ROWS), FINISHED_ROWS))
        v.loop(count - whole * FINISHED_ROWS, lambda i: rows(v.bind(whole * FINISHED_ROWS + i), 1))


def times(levels: Expr, factors: Expr) -> Expr:
    """Bytes by factors, modulo 256: uint8 [64] and int32 [16], a factor for each four bytes."""
    words, lanes = v.bind(v.reinterpret(levels, "uint16", 2 * LANES)), 2 * LANES
    low = v.reinterpret(factors, "uint32", LANES) & v.full(0xFFFF, "uint32", LANES)
    pairs = v.bind(v.reinterpret(v.bind(v.bind(low) * v.full(0x10001, "uint32", LANES)), "uint16", lanes))
    low = v.bind(words * pairs) & v.full(0xFF, "uint16", lanes)
    high = v.bind(words & v.full(0xFF00, "uint16", lanes)) * pairs
    return v.reinterpret(v.bind(low | high), "uint8", VECTOR_BYTES)
