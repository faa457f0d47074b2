"""Matrix product and convolution of integer graphs: uint8 codes by packed k-bit levels, no float anywhere.

    acc[m, n] = bias[n] + sum over taps t and channels c of fed(x[row(m, t), c]) * level[n, t, c]      int32

then the result is acc, or its requantization to uint8 (`requantize.py`). The bias carries the zero point of x and
what the instruction set adds to it (`byte_dot.py`). Pads lie in memory as zero points, so nothing is skipped.
The accumulators of a register tile stay in registers over the whole reduction. With factors (levels in two levels)
the sum of every block is multiplied by its factor before it is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from kbitc.quant.levels import WHOLE_BYTES
from kbitc.quant.packing import GROUP, LANES, UNIT, packed_shape
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ahead import ahead_of
from kbitc.targets.kernels.byte_dot import ByteDot, signed_word
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.isa import Isa, level_bytes, unit_codes
from kbitc.targets.kernels.itiled import LEAST_ROWS, ITiled, LevelArguments, signed_feed, takes
from kbitc.targets.kernels.requantize import Epilogue, arguments, packed_codes, prepare, store_codes, store_first
from kbitc.targets.kernels.rows import ConvRows, MatmulRows, padded_size, unknown_size
from kbitc.targets.kernels.tasks import row_tasks, store_channels
from kbitc.targets.kernels.tiled import lines_of

Expr = Any
Buffer = Any
Key = tuple[int, int, int]
MOST_ROWS = 8
MOST_TILES = 4


@dataclass(frozen=True)
class IgemmSpec:
    """What a kernel computes, apart from the instruction set.

    Attributes:
        rows: where the rows (pixels) of the activation lie; a tap is a row further on.
        pixel: bytes of a row of the activation.
        channels: codes that one tap of one group reads, one after the other; may be more than a row.
        outputs: N of one group.
        taps: T.
        groups: independent groups; group g reads channels g * channels ..., writes outputs g * N ...
        bits: k of the packed levels.
        grid: levels by code; empty with 8 bits, where the bytes are the levels.
        block: channels of one factor, a multiple of 32; 0 without factors.
        epilogue: how accumulators become uint8; None leaves them int32.
        accumulators: also write the accumulators when there is an epilogue.
        flat: the activation is given as one line of bytes with its border.
    """

    rows: MatmulRows | ConvRows
    pixel: int
    channels: int
    outputs: int
    taps: int
    groups: int = 1
    bits: int = WHOLE_BYTES
    grid: tuple[int, ...] = ()
    block: int = 0
    epilogue: Epilogue | None = None
    accumulators: bool = False
    flat: bool = False

    @property
    def group_tiles(self) -> int:
        """16-channel tiles of one group."""
        return -(-self.outputs // LANES)

    @property
    def tiles(self) -> int:
        """16-channel tiles of all groups."""
        return self.groups * self.group_tiles

    @property
    def blocks(self) -> int:
        """Factors of one tap."""
        return -(-self.channels // self.block)


def tile_shape(spec: IgemmSpec, dot: ByteDot) -> tuple[int, int]:
    """(rows, 16-channel tiles) of the register tile: the one that loads least a dot product.

    Sums and the levels of one step share the registers with what LLVM loads ahead (`dot.ahead`): tiles that leave it
    no room spill and lose a third of the speed. With factors every sum needs a second register.
    """
    copies = 2 if spec.block else 1
    best, shape = float("inf"), (1, 1)
    for tiles in range(1, min(MOST_TILES, spec.group_tiles) + 1):
        if spec.groups > 1 and spec.group_tiles % tiles:
            continue
        width = tiles * dot.parts
        rows = min(MOST_ROWS, (dot.registers - dot.ahead - width * dot.held) // (width * copies))
        if rows < 1:
            continue
        # A last group with fewer tiles computes as long for less.
        waste = -(-spec.tiles // tiles) * tiles / spec.tiles
        cost = (1 / rows + 1 / width) * waste
        if cost < best:
            best, shape = cost, (rows, tiles)
    return shape


def few_tiles(spec: IgemmSpec) -> int:
    """16-channel tiles of the register tile of one row."""
    return min(MOST_TILES, spec.group_tiles) if spec.groups == 1 else 1


def make_igemm(spec: IgemmSpec, dot: ByteDot, isa: Isa, name: str, tile: tuple[int, int, int] | None = None) -> Any:
    """The PrimFunc of a specification.

    `tile` has rows and 16-channel tiles of the register tile, and tiles of that of one row; None for the usual ones.
    Groups of which it would leave a rest have the usual ones too.

    Arguments in order: x uint8 [*rows, pixel] (flat: one axis), packed uint8 [tiles, T, Cp/32, k, 64],
    bias int32 [tiles * 16], factors int8 [tiles, T, CB, 16] (if any), multiplier, shift, addend (if any),
    out uint8 or int32 [*out rows, groups * N], accumulators int32 of that shape (if asked for).
    """
    if tile is None or (spec.groups > 1 and any(spec.group_tiles % tiles for tiles in tile[1:])):
        tile = (*tile_shape(spec, dot), few_tiles(spec))
    return v.kernel(name, lambda: _Generator(spec, dot, isa, tile).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: IgemmSpec, dot: ByteDot, isa: Isa, tile: tuple[int, int, int]) -> None:
        self.spec = spec
        self.tile = tile
        self.dot = dot
        self.isa = isa
        self.feed, self.plus = signed_feed(spec)
        self.table: list[Expr] | None = None

    def emit(self) -> None:
        """Arguments, then a task a run of register tiles."""
        spec, dims = self.spec, v.DimVars()
        rows, image = spec.rows.with_dims(dims), None
        if spec.flat and isinstance(rows, ConvRows) and unknown_size(spec.rows.source_shape):
            image, (height, width) = padded_size(rows.attributes.pads)
            rows = replace(rows, padded_height=height, padded_width=width)
        self.rows = rows
        shape = (v.product((rows.source_rows, spec.pixel)),) if spec.flat else (*rows.source_shape, spec.pixel)
        x = v.argument("x", shape, "uint8")
        packed = packed_shape(spec.outputs, spec.taps, spec.channels, spec.bits)
        self.packed = v.argument("packed", (spec.tiles, *packed[1:]), "uint8")
        self.bias = v.argument("bias", (spec.tiles * LANES,), "int32")
        factors = (spec.tiles, spec.taps, spec.blocks, LANES) if spec.block else ()
        self.factors = v.argument("factors", factors, "int8") if spec.block else None
        self.numbers = arguments(spec.epilogue, spec.tiles * LANES)
        if image is not None:
            v.argument("image", (rows.source_shape[0], *image, spec.pixel), "uint8")
        kinds = ["int32" if spec.epilogue is None else "uint8", *(["int32"] if spec.accumulators else [])]
        width = spec.groups * spec.outputs
        outs = [v.argument(f"out{i}", (*rows.out_shape, width), kind) for i, kind in enumerate(kinds)]
        with v.root():
            self.x = v.view(x, (v.product((rows.source_rows, spec.pixel)),), "uint8")
            self.outs = [
                (v.view(out, (rows.count, spec.groups, spec.outputs), kind), kind)
                for out, kind in zip(outs, kinds, strict=True)
            ]
            lines = lines_of(rows, spec.pixel) if takes(spec, self.isa) else None
            if lines is None:
                self._dot_products()
                return
            given = LevelArguments(self.x, self.packed, self.bias, self.factors, rows.count)
            many = ITiled(spec, self.isa, given, lines, self._finish)
            some = not isinstance(rows.count, int) and rows.least < LEAST_ROWS
            v.when(rows.count < v.i64(LEAST_ROWS) if some else False, self._dot_products, many.emit)

    def _dot_products(self) -> None:
        """Register tiles of dot products in parallel."""
        spec, rows = self.spec, self.rows
        # An image has as many rows as pixels, however many images there are.
        ahead = ahead_of([self.packed])
        row_tasks(rows.count, self.tile[:2], self.tile[2], spec.tiles, self._tile, rows.least, ahead)

    def _tile(self, row: Expr, rows: int, first: Expr, tiles: int) -> None:
        """One register tile from its bias to its results in memory."""
        spec, lanes = self.spec, self.dot.lanes
        self.table = None if self.feed.table is None else [v.bind(part) for part in self.isa.table(self.feed.table)]
        out_rows = [v.bind(row + r) for r in range(rows)]
        group = v.i64(0) if spec.groups == 1 else v.bind(tirx.truncdiv(first, v.i64(spec.group_tiles)))
        start = group * spec.channels
        base = [v.held_index(self.rows.base(m) * spec.pixel + start) for m in out_rows]
        sums = {(r, i, p): v.register(lanes, "int32") for r in range(rows)
                for i in range(tiles) for p in range(self.dot.parts)}  # fmt: skip
        for (_, i, p), held in sums.items():
            v.put(held, v.load(self.bias, [(first + i) * LANES + p * lanes], lanes), lanes)
        _Tile(self, first, tiles, sums).taps(base)
        self._finish(out_rows, group, first, tiles, sums)

    def _finish(self, out_rows: list[Expr], group: Expr, first: Expr, tiles: int, sums: dict[Key, Buffer]) -> None:
        """Requantize and store; the last tile of a group stores only its real channels."""
        spec, lanes, packs = self.spec, self.dot.lanes, self._packs(tiles)
        codes: dict[Key, Expr] = {}
        for i in range(tiles):
            tile = v.bind(first + i)
            own = self._own(tile, group)
            for p in range(self.dot.parts):
                way, place = spec.epilogue, v.bind(tile * LANES + p * lanes)
                made = None if way is None else prepare(way, self.dot, self.numbers, place, limited=not packs)
                for r, m in enumerate(out_rows):
                    acc = v.bind(v.get(sums[r, i, p], lanes))
                    if made is not None:
                        codes[r, i, p] = v.bind(made(acc))
                    for out, kind in self.outs:
                        if kind == "int32" or made is None:
                            store_channels(out, [m, group], own, p, acc, spec.outputs, lanes)
                        elif not packs:
                            narrow = v.bind(v.cast(codes[r, i, p], kind, lanes))
                            store_codes(out, [m, group], own, p, narrow, spec.outputs, lanes)
        if packs and spec.epilogue is not None:
            start = v.bind(self._own(first, group) * LANES)
            for r, m in enumerate(out_rows):
                self._store_packed(spec.epilogue, [m, group], start, [codes[key] for key in sums if key[0] == r])

    def _own(self, tile: Expr, group: Expr) -> Expr:
        """The tile counted from the first of its group."""
        return tile if self.spec.groups == 1 else v.bind(tile - group * self.spec.group_tiles)

    def _packs(self, tiles: int) -> bool:
        """Whether the codes of some whole tiles are packed together: it takes fewer instructions than one by one."""
        whole = self.spec.outputs % LANES == 0 and tiles * self.dot.parts > 1
        return whole and self.spec.epilogue is not None and self.dot.packs

    def _store_packed(self, way: Epilogue, outer: list[Expr], start: Expr, values: list[Expr]) -> None:
        """Vectors of neighbouring channels, four at a time. `ByteDot.packed` has them in turns of four channels."""
        dot = self.dot
        words = dot.lanes  # of four bytes
        order = [tirx.const(k * GROUP + q, "int32") for q in range(GROUP) for k in range(words // GROUP)]
        for at in range(0, len(values), GROUP):
            some = values[at : at + GROUP]
            mixed = v.bind(v.reinterpret(packed_codes(way, dot, some), "int32", words))
            codes = v.bind(v.reinterpret(tirx.Shuffle([mixed], order), "uint8", dot.bytes))
            place, count = v.bind(start + at * dot.lanes), len(some) * dot.lanes
            for out, kind in self.outs:
                if kind == "uint8" and count == dot.bytes:
                    v.store(out, [*outer, place], codes, dot.bytes)
                elif kind == "uint8":
                    store_first(out, outer, place, codes, dot.bytes, count)


class _Tile:
    """The reduction of one register tile."""

    def __init__(self, generator: _Generator, first: Expr, tiles: int, sums: dict[Key, Buffer]) -> None:
        self.g = generator
        self.first = first
        self.tiles = tiles
        self.sums = sums
        self.tap: Expr = v.i64(0)
        self.source: list[Expr] = []

    def taps(self, base: list[Expr]) -> None:
        """All taps in order."""
        spec = self.g.spec

        def one(tap: Expr) -> None:
            self.tap = tap
            offset = self.g.rows.tap_offset(tap) * spec.pixel
            self.source = [v.held_index(b + offset) for b in base] if spec.taps > 1 else base
            if spec.block:
                self._blocks()
            else:
                self._channels(self.sums, v.i64(0), spec.channels)

        v.loop(spec.taps, one)

    def _blocks(self) -> None:
        """The blocks of one tap: each summed by itself, then times its factor."""
        spec = self.g.spec
        whole, rest = divmod(spec.channels, spec.block)
        v.loop(whole, lambda b: self._block(b, spec.block))
        if rest:
            self._block(v.i64(whole), rest)

    def _block(self, block: Expr, channels: int) -> None:
        spec, lanes = self.g.spec, self.g.dot.lanes
        own = {key: v.register(lanes, "int32") for key in self.sums}
        for held in own.values():
            v.put(held, v.full(0, "int32", lanes), lanes)
        self._channels(own, v.bind(block * (spec.block // UNIT)), channels)
        for i in range(self.tiles):
            for p in range(self.g.dot.parts):
                stored = v.load(self.g.factors, [self.first + i, self.tap, block, p * lanes], lanes)
                factor = v.bind(v.cast(stored, "int32", lanes))
                for key in [key for key in self.sums if key[1:] == (i, p)]:
                    v.put(self.sums[key], v.get(self.sums[key], lanes) + v.get(own[key], lanes) * factor, lanes)

    def _channels(self, sums: dict[Key, Buffer], unit: Expr, channels: int) -> None:
        """Some channels from the start of a unit on."""
        whole, rest = divmod(channels, UNIT)
        v.loop(whole, lambda i: self._unit(sums, v.bind(unit + i), UNIT))
        if rest:
            self._unit(sums, v.bind(unit + whole), rest)

    def _unit(self, sums: dict[Key, Buffer], unit: Expr, channels: int) -> None:
        """The first channels of one unit."""
        g, lanes = self.g, self.g.dot.lanes
        acc = {key: v.get(held, lanes) for key, held in sums.items()}
        bits = g.spec.bits
        places = [(i, p) for i in range(self.tiles) for p in range(g.dot.parts)]
        units = {(i, p): unit_codes(g.isa, bits, g.packed, [self.first + i, self.tap, unit], p) for i, p in places}
        pairs: dict[Key, Expr] = {}
        steps = -(-channels // GROUP)
        for step in range(steps):
            count = min(GROUP, channels - step * GROUP)
            at = v.bind(unit * UNIT + step * GROUP)
            levels = {key: g.dot.levels(self._bytes(found, step)) for key, found in units.items()}
            for r, source in enumerate(self.source):
                codes = g.dot.splat(self._four(source + at, count))
                for i, p in places:
                    if g.dot.chain:
                        pairs[r, i, p] = g.dot.narrow(pairs.get((r, i, p)), codes, levels[i, p])
                    else:
                        acc[r, i, p] = v.bind(g.dot.dot(acc[r, i, p], codes, levels[i, p]))
            if g.dot.chain and ((step + 1) % g.dot.chain == 0 or step == steps - 1):
                acc = {key: v.bind(total + g.dot.widened(pairs[key])) for key, total in acc.items()}
                pairs.clear()
        for key, held in sums.items():
            v.put(held, acc[key], lanes)

    def _bytes(self, unit: UnitCodes, step: int) -> Expr:
        """The level bytes of one step: uint8 vector."""
        g = self.g
        fed = level_bytes(g.isa, g.feed, g.table, unit, step)
        return v.bind(fed if not g.plus else fed + v.full(g.plus % 256, "uint8", g.dot.bytes))

    def _four(self, place: Expr, count: int) -> Expr:
        """Four codes as an int32 scalar. Behind the last channel they are what the dot product takes for 0."""
        x, dot = self.g.x, self.g.dot
        if count == GROUP:
            return v.bind(v.reinterpret(v.load(x, [place], GROUP), "int32", 1))
        pad = (-dot.offset) % 256
        word: Expr = tirx.const(signed_word(sum(pad << (8 * j) for j in range(count, GROUP))), "int32")
        for j in range(count):
            word = word | tirx.shift_left(tirx.Cast("int32", x[place + j]), tirx.const(8 * j, "int32"))
        return v.bind(word)
