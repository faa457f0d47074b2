"""The product of `qgemm.py` for many rows on AMX tiles: the same integers and the same order of float operations.

Levels are decoded as signed bytes (with offsets as unsigned codes), so that the exact sum of a block is the sum of
codes by levels itself. Integer block scales are multiplied into the levels where that fits a byte, which makes all of
a row one exact sum; where it does not, each block is summed by itself and multiplied in int32, as float scales are in
float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx

from kbitc.quant.packing import LANES, STEPS, UNIT, VECTOR_BYTES
from kbitc.quant.scheme import LARGEST_PRODUCT
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa, level_bytes, signed_levels, stored_bias, unit_codes
from kbitc.targets.kernels.packed import WeightSpec
from kbitc.targets.kernels.qfold import Arguments, Fold, Place
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.kernels.tiled import Lines, Reduction, Tiled, TilePart, lines_of

if TYPE_CHECKING:
    from kbitc.targets.kernels.qgemm import QgemmSpec

Expr = Any
Buffer = Any
MOST_FACTOR = 15
# Fewer rows are left to dot products: by the count of instructions (docs/amx.md) tiles gain from here on.
LEAST_ROWS = 8


def takes(spec: QgemmSpec, isa: Isa) -> bool:
    """Whether tiles compute the product, at least when its rows turn out to be many."""
    count = spec.rows.count
    if not isa.tile_registers or (isinstance(count, int) and count < LEAST_ROWS):
        return False
    if spec.factors and not folds_factors(spec) and spec.taps > 1:
        return False
    return lines_of(spec.rows, spec.padded_channels) is not None and reduction(spec).possible


def reduction(spec: QgemmSpec) -> Reduction:
    """How the channels are cut: spans of a block of scales, or of all."""
    span = spec.channels if folds_factors(spec) else spec.block
    return Reduction(spec.channels, spec.padded_channels, span)


def folds_factors(spec: QgemmSpec) -> bool:
    """Whether (level - zero point) times integer block scale is made in the panel: it fits int8, by the format.

    The sums of blocks are lost, so they must not be asked for.
    """
    return spec.factors and not spec.accumulators and largest_product(spec) <= LARGEST_PRODUCT


def largest_product(spec: WeightSpec) -> int:
    """The largest magnitude of (level - zero point) times factor."""
    levels, largest = spec.data_type.levels, spec.data_type.largest
    factor = min(MOST_FACTOR, LARGEST_PRODUCT // largest)
    return int(factor * (max(levels) - min(levels) if spec.zero_point else largest))


class QTiled(Tiled):
    """A product on tiles.

    Args:
        spec: one that `takes` takes.
        isa: of the vectors.
        args: buffers.
        rows: as in the specification, with the kernel's own dimensions.
        lines: of the rows.
    """

    def __init__(self, spec: QgemmSpec, isa: Isa, args: Arguments, rows: MatmulRows | ConvRows, lines: Lines) -> None:
        self.spec = spec
        self.isa = isa
        self.args = args
        self.folds = folds_factors(spec)
        # Before factors levels are counted from the lowest: unsigned, so that a product of two bytes at once carries
        # nothing. What is counted too much goes off after it.
        self.lowest = min(0, *spec.data_type.levels)
        self.feed, self.plus = signed_levels(spec.data_type.levels, self.lowest if self.folds else spec.origin)
        self.table: list[Expr] | None = None
        self.fold_rows = Fold(spec, isa, args, stored_bias(spec.data_type))
        self.rows, self.output_tiles, self.taps = rows.count, spec.output_tiles, spec.taps
        self.reduction, self.lines = reduction(spec), lines
        self.activations, self.one_sum = args.codes, False
        self.left_signed, self.right_signed = True, not spec.offset

    def prepare(self) -> None:
        """See `Tiled.prepare`."""
        table = self.feed.table
        self.table = None if table is None else [v.bind(part) for part in self.isa.table(table)]

    def decode(self, tile: Expr, tap: Expr, unit: Expr) -> list[Expr]:
        """See `Tiled.decode`."""
        bits = self.spec.data_type.bits
        codes = unit_codes(self.isa, bits, self.args.weight.packed, [tile, tap, unit], 0)
        made = []
        half = STEPS // 2
        for step in range(STEPS):
            if self.folds and step % half == 0:
                numbers = self._block_numbers(tile, tap, unit, step // half)
            levels = level_bytes(self.isa, self.feed, self.table, codes, step)
            if self.plus:
                levels = levels + v.full(self.plus % 256, "uint8", VECTOR_BYTES)
            levels = v.bind(levels)
            if self.folds:
                levels = v.bind(v.bind(times(levels, numbers[0])) - numbers[1])
            made.append(levels)
        return made

    def _block_numbers(self, tile: Expr, tap: Expr, unit: Expr, half: int) -> tuple[Expr, Expr]:
        """Factors of half a unit as uint16 [32], and factor times what levels are counted too much as uint8 [64].

        The last block also pads.
        """
        spec, weight = self.spec, self.args.weight
        start = unit * UNIT + half * (UNIT // 2)
        block = v.bind(tirx.min(tirx.truncdiv(start, v.i64(spec.block)), v.i64(spec.blocks - 1)))
        factors = v.bind(v.cast(v.load(weight.factors, [tile, tap, block, 0], LANES), "uint32", LANES))
        if weight.zeros is None:
            above = v.full(-self.lowest, "uint32", LANES)
        else:
            stored = v.cast(v.load(weight.zeros, [tile, tap, block, 0], LANES), "uint32", LANES)
            above = v.bind(stored - v.full(stored_bias(spec.data_type) + self.lowest, "uint32", LANES))
        less = _repeated(_repeated(v.bind(factors * above), 8), 16)
        pairs = v.reinterpret(_repeated(factors, 16), "uint16", 2 * LANES)
        return v.bind(pairs), v.bind(v.reinterpret(less, "uint8", VECTOR_BYTES))

    def begin(self, part: TilePart) -> None:
        """Sums of 0.0, totals of 0: their bits are the same."""

        def row(r: Expr) -> None:
            for i in range(part.tiles):
                part.keep(r, i, v.full(0, "int32", LANES))

        part.each_row(row)

    def fold(self, part: TilePart, tap: Expr, block: Expr) -> None:
        """See `Tiled.fold`."""
        if self.folds:
            steps = self.fold_rows.steps(part.first, part.tiles)
            self._each(part, tap, lambda source, row, exact, held: self.fold_rows.totals(steps, exact, source, held))
            return
        numbers = self.fold_rows.numbers(part.first, part.tiles, tap, block)
        self._each(part, tap, lambda source, row, exact, held: self.fold_rows.row(numbers, exact, source, row, held))

    def end(self, part: TilePart) -> None:
        """Totals to floats where block scales are factors, then bias, clamp, results."""
        steps = self.fold_rows.steps(part.first, part.tiles) if self._totals else {}

        def row(r: Expr) -> None:
            at = v.bind(part.row + r)
            held = self._registers(part, r)
            if self._totals:
                totals = {place: v.bind(v.get(buffer, LANES)) for place, buffer in held.items()}
                held = {place: v.register(LANES, "float32") for place in held}
                for buffer in held.values():
                    v.put(buffer, v.full(0.0, "float32", LANES), LANES)
                self.fold_rows.totals(steps, totals, at, held)
            self.fold_rows.finish(part.first, [(at, held)])

        part.each_row(row)

    @property
    def _totals(self) -> bool:
        """Whether exact sums of blocks are added in int32: there is one tap then."""
        return self.spec.factors and not self.folds

    def _registers(self, part: TilePart, r: Expr) -> dict[Place, Buffer]:
        """What the sums of a row are added to, in registers."""
        dtype = "int32" if self._totals else "float32"
        held = {(i, 0): v.register(LANES, dtype) for i in range(part.tiles)}
        for (i, _), buffer in held.items():
            v.put(buffer, part.load(r, i, dtype, total=True), LANES)
        return held

    def _each(self, part: TilePart, tap: Expr, body: Any) -> None:
        """body(row of the activation, row of the output, exact sums, registers) for every row; keeps the registers."""
        offset = v.bind(self.lines.tap_offset(tap))

        def row(r: Expr) -> None:
            source, held = part.source(r, self.lines.step, offset), self._registers(part, r)
            exact = {(i, 0): part.load(r, i, "int32", total=False) for i in range(part.tiles)}
            body(source, v.bind(part.row + r), exact, held)
            for (i, _), buffer in held.items():
                part.keep(r, i, v.bind(v.get(buffer, LANES)))

        part.each_row(row)


def _repeated(word: Expr, bits: int) -> Expr:
    """The low bits of every lane again above them."""
    return v.bind(word | tirx.shift_left(word, v.full(bits, "uint32", LANES)))


def times(levels: Expr, factors: Expr) -> Expr:
    """Bytes by factors, two at once: uint8 [64] and uint16 [32]; no product may exceed a byte."""
    words = v.reinterpret(levels, "uint16", 2 * LANES) * factors
    return v.reinterpret(v.bind(words), "uint8", VECTOR_BYTES)
