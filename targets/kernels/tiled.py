"""Products of many rows by AMX tiles: what the float-scaled and the integer kernels share.

A task multiplies some hundred rows by a group of two 16-channel tiles of the weight. It decodes their levels once, into
a *panel* of bytes that are the vectors of `isa.level_bytes` one after the other: 16 channels by 4 of K, just as a right
tile reads its rows. Then it takes the rows 32 at a time: two left tiles by two right tiles, whose four int32 sums stay
in tiles over a *span* of K: all of it, or one block of float scales. Rows are read where they lie. The last rows
have a configuration of their own with as many rows as there are, so that nothing behind them is read.

    tile   0 1 2 3              4 5               6 7
    holds  sums (left, right)   rows (left)       levels (right)

A tile row holds `width` channels, of which a span is a multiple. Only the last channels may be fewer: their window ends
with the row, and the panel has zeros for those that were counted before.
The tiles of a thread are configured at the start of a task and released at its end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT, VECTOR_BYTES, round_up
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.x86.intrin import tdpb, tiles

Expr = Any
Buffer = Any
ROWS, WIDEST = tiles.ROWS, tiles.ROW_BYTES
LEFT, RIGHT = 4, 6
BLOCK_ROWS = 2 * ROWS
GROUP_TILES = 2
# Rows that one task multiplies by one panel: more make decoding cheaper, fewer make more tasks.
TASK_ROWS, FEW_TASK_ROWS = 512, 128
FEW_GROUPS = 16
# int32 of the sums of 32 rows by 32 channels, and of what they are added to, in one scratch buffer.
SUMS = BLOCK_ROWS * GROUP_TILES * LANES
# Where a 0 lies in it. LLVM cannot know that it is 0, so that addresses in the panel stay displacements of a register;
# otherwise it works out hundreds of them ahead and spills them.
ZERO = 2 * SUMS


@dataclass(frozen=True)
class Span:
    """Channels that are summed in tiles, from `start` (may be an expression): whole windows, and one with zeros.

    Attributes:
        block: number of the span in its tap.
        start: first channel.
        windows: whole windows.
        tail: first channel of the last window, -1 without one; it reads the panel's tail rows.
    """

    block: Expr
    start: Expr
    windows: int
    tail: int = -1


@dataclass(frozen=True)
class Reduction:
    """How the channels of a tap are cut.

    Attributes:
        channels: C.
        readable: bytes of a row from its first channel on that belong to it, at least C; those behind C are 0.
        span: channels of one sum; C or more for one sum a tap.
    """

    channels: int
    readable: int
    span: int

    @property
    def possible(self) -> bool:
        """Whether tiles can do it: rows of whole groups of four."""
        return self.readable % GROUP == 0

    @property
    def width(self) -> int:
        """Channels of a window: the widest of which a span is a multiple; of all channels as few windows as can be."""
        if self.span >= self.channels:
            return round_up(-(-self.channels // -(-self.channels // WIDEST)), GROUP)
        return next(width for width in range(WIDEST, 0, -GROUP) if self.span % width == 0)

    @property
    def whole(self) -> int:
        """Spans without a window of their own kind."""
        return self.channels // self.span if self.span < self.channels else 0

    @property
    def last(self) -> Span | None:
        """The last channels of a tap, where they are no whole span."""
        start = self.whole * self.span
        windows, rest = divmod(self.channels - start, self.width)
        if not windows and not rest:
            return None
        end = start + windows * self.width
        if not rest:
            return Span(v.i64(self.whole), v.i64(start), windows)
        if end + self.width <= self.readable:
            return Span(v.i64(self.whole), v.i64(start), windows + 1)
        return Span(v.i64(self.whole), v.i64(start), windows, self.readable - self.width)

    @property
    def counted(self) -> int:
        """Channels before the tail window's own."""
        last = self.last
        return 0 if last is None else self.whole * self.span + last.windows * self.width

    @property
    def panel_rows(self) -> int:
        """Vectors of the panel of one 16-channel tile and tap: all decoded ones, then those of the tail window."""
        tail = self.last is not None and self.last.tail >= 0
        return self.decoded_rows + (self.width // GROUP if tail else 0)

    @property
    def decoded_rows(self) -> int:
        """Vectors that are decoded."""
        return round_up(self.channels, UNIT) // GROUP


@dataclass(frozen=True)
class Lines:
    """Where the rows of left tiles lie: `high` rows of the output are `step` pixels apart, wherever they start.

    Attributes:
        high: rows of a left tile. Those of a convolution divide a line of its output.
        step: pixels from row to row.
        pixel: bytes of a pixel.
        start: the pixel under the first tap of a row of the output that a left tile starts with.
        tap_offset: pixels from the first tap to a tap.
    """

    high: int
    step: int
    pixel: int
    start: Callable[[Expr], Expr]
    tap_offset: Callable[[Expr], Expr]


def lines_of(rows: MatmulRows | ConvRows, pixel: int) -> Lines | None:
    """The lines of a matrix, or of an image whose output has lines of a known length that equal tiles make up."""
    if isinstance(rows, MatmulRows):
        return Lines(ROWS, 1, pixel, rows.base, rows.tap_offset)
    width, attributes = rows.out_width, rows.attributes
    if not isinstance(width, int) or not isinstance(rows.padded_width, int):
        return None
    inside = (rows.padded_height, rows.padded_width) == (rows.out_height, rows.out_width)
    if attributes.kernel == (1, 1) and attributes.strides == (1, 1) and inside:
        return Lines(ROWS, 1, pixel, lambda row: row, rows.tap_offset)
    high, rest = divmod(width, -(-width // ROWS))
    return None if rest else Lines(high, attributes.strides[1], pixel, rows.base, rows.tap_offset)


class Tiled(ABC):
    """A product of rows that lie at one distance; the subclasses know levels, sums and results.

    Attributes:
        rows: number of rows, an int or an expression.
        output_tiles: 16-channel tiles of the weight.
        taps: T.
        reduction: of a tap.
        lines: where rows lie.
        activations: buffer of bytes with the rows.
        one_sum: the sums of all taps are one; otherwise those of a span are folded.
        ready: packed levels [tiles, T, Cp/32, 8, 64] that are level bytes already, and so a panel without tail rows.
        left_signed, right_signed: how the bytes of rows and of levels are read.
    """

    rows: Any
    output_tiles: int
    taps: int
    reduction: Reduction
    lines: Lines
    activations: Buffer
    one_sum: bool
    left_signed: bool
    right_signed: bool
    ready: Buffer | None = None

    @abstractmethod
    def decode(self, tile: Expr, tap: Expr, unit: Expr) -> list[Expr]:
        """The level bytes of the steps of a unit: 8 uint8 vectors of 64."""

    @abstractmethod
    def prepare(self) -> None:
        """Load what all look-ups share; once a task."""

    @abstractmethod
    def begin(self, part: TilePart) -> None:
        """Before the sums of some rows: make what is added to, or with `one_sum` load what the sums start from."""

    @abstractmethod
    def fold(self, part: TilePart, tap: Expr, block: Expr) -> None:
        """The sums of a span lie in the scratch buffer; never called with `one_sum`."""

    @abstractmethod
    def end(self, part: TilePart) -> None:
        """All sums of some rows are done; with `one_sum` they lie in the scratch buffer."""

    def emit(self) -> None:
        """Parallel tasks. There is at least one row."""
        groups = -(-self.output_tiles // GROUP_TILES)
        run = (TASK_ROWS if groups >= FEW_GROUPS else FEW_TASK_ROWS) // BLOCK_ROWS * 2 * self.lines.high
        rows = self.rows
        runs = -(-rows // run) if isinstance(rows, int) else tirx.truncdiv(rows + (run - 1), v.i64(run))
        with builder.parallel(v.i64(0), v.i64(groups * runs)) as task:
            group, start = (0, 0) if groups == 1 and runs == 1 else (tirx.truncdiv(task, v.i64(runs)),
                                                                    tirx.truncmod(task, v.i64(runs)) * run)  # fmt: skip
            first, row = v.bind(v.i64(group * GROUP_TILES)), v.bind(v.i64(start))
            panel = self.ready
            if panel is None:
                size = GROUP_TILES * self.taps * self.reduction.panel_rows * VECTOR_BYTES
                panel = builder.alloc_buffer((size,), "uint8", scope="local")
            scratch = builder.alloc_buffer((2 * SUMS + LANES,), "int32", scope="local")
            count = min(rows, run) if isinstance(rows, int) and rows <= run else v.bind(
                tirx.min(v.i64(rows) - row, v.i64(run)))  # fmt: skip
            odd = self.output_tiles % GROUP_TILES == 1
            task_of = _Task(self, panel, scratch, row, count, first)
            if groups == 1:
                task_of.emit(self.output_tiles)
            elif odd:
                v.when(first < v.i64(self.output_tiles - 1), lambda: task_of.emit(2), lambda: task_of.emit(1))
            else:
                task_of.emit(GROUP_TILES)


@dataclass(frozen=True)
class TilePart:
    """Some rows by one or two 16-channel tiles.

    Attributes:
        row: the first row.
        count: rows, an int or an expression, at most 32.
        starts: where the rows of each left tile start (`Lines.start`).
        high: rows of a left tile, but for the last one's.
        first: first 16-channel tile.
        tiles: 16-channel tiles.
        scratch: int32: the exact sums, then what they are added to, each [32, 32].
    """

    row: Expr
    count: Any
    starts: list[Expr]
    high: int
    first: Expr
    tiles: int
    scratch: Buffer

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(left tile, right tile) of all sums."""
        return [(half, i) for half in range(len(self.starts)) for i in range(self.tiles)]

    def source(self, r: Expr, step: int, offset: Expr) -> Expr:
        """The pixel of row r, where a tap is `offset` further on and a row `step`."""
        if len(self.starts) == 1 or self.high == ROWS and step == 1:
            return v.bind(self.starts[0] + offset + r * step)
        upper = tirx.Select(r < v.i64(self.high), self.starts[0], self.starts[1] - self.high * step)
        return v.bind(upper + offset + r * step)

    def each_row(self, body: Callable[[Expr], None]) -> None:
        """For every row, counted from the first."""
        v.loop(self.count, body)

    def load(self, r: Expr, tile: int, dtype: str, *, total: bool) -> Expr:
        """16 sums of row r, or what they are added to, as int32 or float32."""
        held = v.load(self.scratch, [self._place(r, tile, total)], LANES)
        return v.bind(held if dtype == "int32" else v.reinterpret(held, dtype, LANES))

    def keep(self, r: Expr, tile: int, value: Expr) -> None:
        """Put what sums are added to."""
        if str(value.ty.dtype) != f"int32x{LANES}":
            value = v.reinterpret(value, "int32", LANES)
        v.store(self.scratch, [self._place(r, tile, total=True)], v.bind(value), LANES)

    def _place(self, r: Expr, tile: int, total: bool) -> Expr:
        return r * (GROUP_TILES * LANES) + (tile * LANES + (SUMS if total else 0))


@dataclass(frozen=True)
class _Task:
    """A panel by some rows."""

    product: Tiled
    panel: Buffer
    scratch: Buffer
    row: Expr
    count: Any
    first: Expr

    def emit(self, count: int) -> None:
        """Decode the panel of `count` tiles, then all rows, 32 at a time."""
        v.store(self.scratch, [ZERO], tirx.const(0, "int32"), 1)
        if self.product.ready is None:
            self.product.prepare()
            v.loop(self.product.taps, lambda tap: v.loop(count, lambda i: self._decode(tap, i, count)))
        rows = self.count
        high = self.product.lines.high
        if isinstance(rows, int):
            whole, rest = divmod(rows, 2 * high)
        else:
            whole = v.bind(tirx.truncdiv(rows, v.i64(2 * high)))
            rest = v.bind(rows - whole * (2 * high))
        if not isinstance(whole, int) or whole:
            self._configure(high, high)
            v.loop(whole, lambda i: self._part(v.bind(self.row + i * (2 * high)), 2 * high, 2, count))
        if not isinstance(rest, int) or rest:
            at = v.bind(self.row + whole * (2 * high))
            v.when(_known(rest > 0), lambda: self._rest(at, rest, count))
        tiles.release()

    def _rest(self, row: Expr, rows: Any, count: int) -> None:
        """The last rows, fewer than two left tiles have."""
        high = self.product.lines.high

        def part(halves: int) -> None:
            self._configure(*((high, rows - high) if halves == 2 else (rows, 0)))
            self._part(row, rows, halves, count)

        v.when(_known(rows > high), lambda: part(2), lambda: part(1))

    def _configure(self, upper: Any, lower: Any) -> None:
        """Tiles for `upper` and `lower` rows; none where `lower` is 0."""
        width = self.product.reduction.width
        both = not isinstance(lower, int) or lower > 0
        second = WIDEST if both else 0
        steps = width // GROUP
        row_bytes = [WIDEST, WIDEST, second, second, width, width if both else 0, WIDEST, WIDEST]
        tiles.configure([upper, upper, lower, lower, upper, lower, steps, steps], row_bytes)

    def _panel_row(self, tap: Expr, i: Expr, count: int) -> Expr:
        """Number of the first vector of a tile's panel."""
        if self.product.ready is None:
            return (tap * count + i) * self._pitch
        return (self.first + i) * self._pitch + tap * self.product.reduction.panel_rows

    @property
    def _pitch(self) -> int:
        """Vectors from the panel of a tile to that of the next."""
        product = self.product
        return product.reduction.panel_rows * (1 if product.ready is None else product.taps)

    def _decode(self, tap: Expr, i: Expr, count: int) -> None:
        """The panel of one tile and tap."""
        made, tile = self.product.reduction, v.bind(self.first + i)
        start = v.bind(self._panel_row(tap, i, count) * VECTOR_BYTES)

        def unit(number: Expr) -> None:
            place = v.bind(start + number * (STEPS * VECTOR_BYTES))
            for step, levels in enumerate(self.product.decode(tile, tap, number)):
                v.store(self.panel, [place + step * VECTOR_BYTES], levels, VECTOR_BYTES)

        v.loop(made.decoded_rows // STEPS, unit)
        if made.panel_rows == made.decoded_rows or made.last is None:
            return
        for row in range(made.width // GROUP):
            channel, levels = made.last.tail + row * GROUP, v.full(0, "uint8", VECTOR_BYTES)
            if made.counted <= channel < made.channels:
                source = start + channel // GROUP * VECTOR_BYTES
                levels = v.bind(v.load(self.panel, [source], VECTOR_BYTES))
            v.store(self.panel, [start + (made.decoded_rows + row) * VECTOR_BYTES], levels, VECTOR_BYTES)

    def _part(self, row: Expr, rows: Any, halves: int, count: int) -> None:
        """Some rows by the panel, from nothing to their results."""
        high = self.product.lines.high
        # Bound, because a held index alone would be read again wherever it is used.
        starts = [v.bind(v.held_index(self.product.lines.start(v.bind(row + half * high)))) for half in range(halves)]
        part = TilePart(row, rows, starts, high, self.first, count, self.scratch)
        self.product.begin(part)
        v.loop(self.product.taps, lambda tap: self._tap(part, tap))
        if self.product.one_sum:
            self._store(part)
        self.product.end(part)

    def _tap(self, part: TilePart, tap: Expr) -> None:
        """All spans. The dot products of a span come before the fold of the one before it, which needs no tiles."""
        made, last = self.product.reduction, self.product.reduction.last
        windows = made.span // made.width

        def sums(block: Expr) -> None:
            self._sums(part, tap, Span(block, v.bind(block * made.span), windows))

        def after(block: Expr) -> None:
            sums(v.bind(block + 1))
            self.product.fold(part, tap, block)
            self._store(part)

        if self.product.one_sum and last is not None:
            self._sums(part, tap, last)
            return
        if made.whole:
            sums(v.i64(0))
            self._store(part)
            v.loop(made.whole - 1, after)
        if last is not None:
            self._sums(part, tap, last)
            if made.whole:
                self.product.fold(part, tap, v.i64(made.whole - 1))
            self._store(part)
        self.product.fold(part, tap, v.i64(made.whole - 1) if last is None else last.block)

    def _sums(self, part: TilePart, tap: Expr, span: Span) -> None:
        """One exact sum in tiles."""
        made, lines = self.product.reduction, self.product.lines
        for half, i in () if self.product.one_sum else part.pairs:
            tiles.zero(2 * half + i)
        offset = v.bind(lines.tap_offset(tap))
        lefts = [v.bind((start + offset) * lines.pixel) for start in part.starts]
        zero = tirx.Cast("int64", self.scratch[v.i64(ZERO)])
        panel = v.bind(self._panel_row(tap, v.i64(0), part.tiles) * VECTOR_BYTES + zero)

        def window(index: Expr) -> None:
            at = v.bind(span.start + index * made.width)
            self._dots(part, lefts, at, v.bind(panel + at * (VECTOR_BYTES // GROUP)))

        v.loop(span.windows, window)
        if span.tail >= 0:
            self._dots(part, lefts, v.i64(span.tail), v.bind(panel + made.decoded_rows * VECTOR_BYTES))

    def _store(self, part: TilePart) -> None:
        """The sums to the scratch buffer."""
        for half, i in part.pairs:
            place = (half * part.high * GROUP_TILES + i) * LANES
            tiles.store(2 * half + i, tiles.address(self.scratch, v.i64(place)), 4 * GROUP_TILES * LANES)

    def _dots(self, part: TilePart, lefts: list[Expr], channel: Expr, levels: Expr) -> None:
        """One window: every left tile by every right tile."""
        product, lines = self.product, self.product.lines
        for half, left in enumerate(lefts):
            tiles.load(LEFT + half, tiles.address(product.activations, left + channel), lines.step * lines.pixel)
        for i in range(part.tiles):
            place = levels + i * (self._pitch * VECTOR_BYTES)
            tiles.load(RIGHT + i, tiles.address(self.panel, place), VECTOR_BYTES)
        for half, i in part.pairs:
            tdpb.emit(2 * half + i, LEFT + half, RIGHT + i,
                      left_signed=product.left_signed, right_signed=product.right_signed)  # fmt: skip


def _known(condition: Any) -> Any:
    """A condition of ints as a Python bool."""
    return bool(condition) if isinstance(condition, int) else condition
