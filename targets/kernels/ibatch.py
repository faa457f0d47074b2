"""Products of two activations of integer graphs, batch by batch: uint8 codes by uint8 codes.

    acc[..., m, n] = sum over c of (a[..., m, c] - a_zero) * (b[..., c, n] - b_zero)        int32

then the requantization, one for all. The codes of b become levels, b - 128, in the layout of a four-way dot product:
one kernel packs them, once, with what every column adds; the other multiplies. With f = a + offset as it is fed,

    acc = sum f * level  +  (128 - b_zero) * sum f  -  (a_zero + offset) * (sum level + C * (128 - b_zero))

where the second sum is a dot product with ones (none when b_zero is 128), and the last term belongs to the column.
All dimensions may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, VECTOR_BYTES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.batch import BatchSpec, quotient, source_batch
from kbitc.targets.kernels.byte_dot import ByteDot, signed_word
from kbitc.targets.kernels.requantize import Epilogue, arguments, prepare

Expr = Any
Buffer = Any
Dim = Any
MIDDLE = 128
MOST_ROWS = 8
MOST_TILES = 4
# 16-column tiles of a register tile when the number of columns is symbolic.
DYNAMIC_TILES = 2
# Row tiles of a parallel task.
TASK_ROW_TILES = 8


@dataclass(frozen=True)
class IbatchSpec(BatchSpec):
    """What the kernels compute.

    Attributes:
        swapped: b is [..., N, C].
        a_zero, b_zero: zero points.
        epilogue: how accumulators become uint8; None leaves them int32.
        accumulators: also write the accumulators when there is an epilogue.
    """

    swapped: bool
    a_zero: int
    b_zero: int
    epilogue: Epilogue | None = None
    accumulators: bool = False

    def packed_shapes(self) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
        """Shapes of the packed levels and of what the columns add."""
        tiles = quotient(self.columns + (LANES - 1), LANES)
        steps = quotient(self.channels + (GROUP - 1), GROUP)
        return (v.product(self.b_lead), tiles, steps, VECTOR_BYTES), (v.product(self.b_lead), tiles, LANES)


def ones(dot: ByteDot) -> Expr:
    """Four codes that are fed as ones: an int32 scalar."""
    return tirx.const(signed_word(((1 - dot.offset) % 256) * 0x01010101), "int32")


def make_pack(spec: IbatchSpec, dot: ByteDot, name: str) -> Any:
    """The PrimFunc: b u8 [*b lead, C, N] (swapped: N, C), packed u8 [B, tiles, steps, 64], added i32 [B, tiles, 16]."""
    return v.kernel(name, lambda: _Packer(spec, dot).emit())


def make_ibatch(spec: IbatchSpec, dot: ByteDot, name: str) -> Any:
    """The PrimFunc.

    Arguments: a u8 [*a lead, M, C], packed and added (`make_pack`), multiplier, shift, addend [16] (if any),
    out u8 or int32 [*lead, M, N], accumulators int32 of that shape (if asked for).
    """
    return v.kernel(name, lambda: _Product(spec, dot).emit())


class _Packer:
    """One task a tile of 16 columns."""

    def __init__(self, spec: IbatchSpec, dot: ByteDot) -> None:
        self.spec = spec
        self.dot = dot

    def emit(self) -> None:
        """Arguments, tasks."""
        spec, dims = self.spec, v.DimVars()
        lead = tuple(dims(d) for d in spec.b_lead)
        self.channels, self.columns = dims(spec.channels), dims(spec.columns)
        self.tiles = quotient(self.columns + (LANES - 1), LANES)
        self.steps = quotient(self.channels + (GROUP - 1), GROUP)
        inner = (self.columns, self.channels) if spec.swapped else (self.channels, self.columns)
        b, count = v.argument("b", (*lead, *inner), "uint8"), v.product(lead)
        packed = v.argument("packed", (count, self.tiles, self.steps, VECTOR_BYTES), "uint8")
        added = v.argument("added", (count, self.tiles, LANES), "int32")
        with v.root():
            self.b = v.view(b, (v.product((*lead, *inner)),), "uint8")
            self.packed = v.view(packed, (v.product((count, self.tiles, self.steps, VECTOR_BYTES)),), "uint8")
            self.added = v.view(added, (v.product((count, self.tiles, LANES)),), "int32")
            with builder.parallel(v.i64(0), v.i64(count * self.tiles)) as task:
                batch, tile = (
                    v.bind(tirx.truncdiv(task, v.i64(self.tiles))),
                    v.bind(tirx.truncmod(task, v.i64(self.tiles))),
                )
                self._tile(batch, tile, task)

    def _tile(self, batch: Expr, tile: Expr, task: Expr) -> None:
        spec = self.spec
        to = v.bind(task * (self.steps * VECTOR_BYTES))
        column = v.bind(tile * LANES)
        start = v.bind(batch * (self.channels * self.columns) + column * (self.channels if spec.swapped else 1))
        real = v.bind(tirx.min(v.i64(self.columns) - column, v.i64(LANES)))
        whole = quotient(self.channels, GROUP)
        if spec.swapped:
            v.loop(real, lambda lane: v.loop(whole, partial(self._word, to, start, lane)))
        else:
            fast = real == v.i64(LANES)
            v.when(fast, lambda: v.loop(whole, partial(self._rows, to, start)),
                   lambda: v.loop(whole, lambda step: self._bytes(to, start, real, step)))  # fmt: skip
        v.loop(self.steps - whole, lambda i: self._bytes(to, start, real, v.bind(whole + i)))
        self._columns(to, task)

    def _word(self, to: Expr, start: Expr, lane: Expr, step: Expr) -> None:
        """Four codes that lie together (b swapped)."""
        four = v.load(self.b, [start + lane * self.channels + step * GROUP], GROUP)
        levels = v.bind(four ^ v.full(MIDDLE, "uint8", GROUP))
        v.store(self.packed, [to + step * VECTOR_BYTES + lane * GROUP], levels, GROUP)

    def _rows(self, to: Expr, start: Expr, step: Expr) -> None:
        """Four rows of sixteen columns, interleaved byte by byte."""
        rows = [v.bind(v.load(self.b, [start + (step * GROUP + j) * self.columns], LANES)) for j in range(GROUP)]
        v.store(self.packed, [to + step * VECTOR_BYTES], levels_of_rows(rows), VECTOR_BYTES)

    def _bytes(self, to: Expr, start: Expr, real: Expr, step: Expr) -> None:
        """One step byte by byte: columns and channels that do not exist are levels of 0."""
        place = v.bind(to + step * VECTOR_BYTES)
        v.store(self.packed, [place], v.full(0, "uint8", VECTOR_BYTES), VECTOR_BYTES)
        by_channel, by_column = (1, self.channels) if self.spec.swapped else (self.columns, 1)

        def column(lane: Expr) -> None:
            def one(j: Expr) -> None:
                code = self.b[start + lane * by_column + (step * GROUP + j) * by_channel]
                v.store(self.packed, [place + lane * GROUP + j], code ^ tirx.const(MIDDLE, "uint8"), 1)

            v.loop(v.bind(tirx.min(v.i64(self.channels) - step * GROUP, v.i64(GROUP))), one)

        v.loop(real, column)

    def _columns(self, to: Expr, task: Expr) -> None:
        """-(a_zero + offset) * (sum level + C * (128 - b_zero)) of the sixteen columns."""
        dot, lanes, spec = self.dot, self.dot.lanes, self.spec
        codes = dot.splat(ones(dot))
        sums = [v.register(lanes, "int32") for _ in range(dot.parts)]
        for held in sums:
            v.put(held, v.full(0, "int32", lanes), lanes)

        def add(step: Expr) -> None:
            for p, held in enumerate(sums):
                found = v.bind(v.load(self.packed, [to + step * VECTOR_BYTES + p * dot.bytes], dot.bytes))
                v.put(held, dot.dot(v.get(held, lanes), codes, dot.levels(found)), lanes)

        v.loop(self.steps, add)
        more = v.bind(tirx.Cast("int32", v.i64(self.channels)) * tirx.const(MIDDLE - spec.b_zero, "int32"))
        for p, held in enumerate(sums):
            total = v.get(held, lanes) + v.splat(more, lanes)
            value = total * v.full(-(spec.a_zero + dot.offset), "int32", lanes)
            v.store(self.added, [task * LANES + p * lanes], v.bind(value), lanes)


def levels_of_rows(rows: Sequence[Expr]) -> Expr:
    """Codes of four rows of 16 columns as levels, the four of a column together: uint8 [64]."""
    low, high = (_zipped(rows[j], rows[j + 1]) for j in (0, 2))
    pairs = [v.bind(v.reinterpret(side, "uint16", LANES)) for side in (low, high)]
    mixed = [pick for lane in range(LANES) for pick in (lane, LANES + lane)]
    joined = v.bind(tirx.Shuffle(pairs, [tirx.const(pick, "int32") for pick in mixed]))
    return v.bind(v.reinterpret(joined, "uint8", VECTOR_BYTES) ^ v.full(MIDDLE, "uint8", VECTOR_BYTES))


def _zipped(a: Expr, b: Expr) -> Expr:
    """a[0], b[0], a[1], ...: uint8 of twice the lanes."""
    picks = [pick for lane in range(LANES) for pick in (lane, LANES + lane)]
    return v.bind(tirx.Shuffle([a, b], [tirx.const(pick, "int32") for pick in picks]))


class _Product:
    """One task for some rows of one batch."""

    def __init__(self, spec: IbatchSpec, dot: ByteDot) -> None:
        self.spec = spec
        self.dot = dot
        self.shift = MIDDLE - spec.b_zero

    def emit(self) -> None:
        """Arguments, tasks."""
        spec, dims = self.spec, v.DimVars()
        a_lead, b_lead, lead = spec.leads(dims)
        rows, self.channels, self.columns = (dims(d) for d in (spec.rows, spec.channels, spec.columns))
        self.tiles = quotient(self.columns + (LANES - 1), LANES)
        self.steps = quotient(self.channels + (GROUP - 1), GROUP)
        a = v.argument("a", (*a_lead, rows, self.channels), "uint8")
        packed_shape = (v.product(b_lead), self.tiles, self.steps, VECTOR_BYTES)
        packed = v.argument("packed", packed_shape, "uint8")
        added = v.argument("added", (v.product(b_lead), self.tiles, LANES), "int32")
        self.numbers = arguments(spec.epilogue, LANES)
        kinds = ["int32" if spec.epilogue is None else "uint8", *(["int32"] if spec.accumulators else [])]
        shape = (*lead, rows, self.columns)
        outs = [v.argument(f"out{i}", shape, kind) for i, kind in enumerate(kinds)]
        tile_rows, wide = self._tile_shape()
        run = tile_rows * TASK_ROW_TILES
        tasks = quotient(rows + (run - 1), run)
        with v.root():
            self.a = v.view(a, (v.product((*a_lead, rows, self.channels)),), "uint8")
            self.packed = v.view(packed, (v.product(packed_shape),), "uint8")
            self.added = v.view(added, (v.product((v.product(b_lead), self.tiles, LANES)),), "int32")
            self.outs = [(v.view(o, (v.product(shape),), kind), kind) for o, kind in zip(outs, kinds, strict=True)]
            with builder.parallel(v.i64(0), v.i64(v.product(lead) * tasks)) as task:
                batch, chunk = v.bind(tirx.truncdiv(task, v.i64(tasks))), v.bind(tirx.truncmod(task, v.i64(tasks)))
                self.a_start = v.bind(source_batch(batch, lead, a_lead) * (rows * self.channels))
                self.matrix = v.bind(source_batch(batch, lead, b_lead) * self.tiles)
                self.out_start = v.bind(batch * (rows * self.columns))
                first = v.bind(chunk * run)
                count = v.bind(tirx.min(v.i64(rows) - first, v.i64(run)))
                self._columns_of_rows(first, count, tile_rows, wide)

    def _tile_shape(self) -> tuple[int, int]:
        """Rows and 16-column tiles of the register tile; the sum of a row takes a register where it is wanted."""
        dot = self.dot
        wide = min(MOST_TILES, self.tiles) if isinstance(self.tiles, int) else DYNAMIC_TILES
        while True:
            width = wide * dot.parts
            rows = (dot.registers - dot.ahead - width * dot.held) // (width + (1 if self.shift else 0))
            if rows >= min(4, MOST_ROWS) or wide == 1:
                return max(1, min(MOST_ROWS, rows)), wide
            wide -= 1

    def _columns_of_rows(self, first: Expr, count: Expr, tile_rows: int, wide: int) -> None:
        """All columns of some rows: a group of tiles at a time, so that its levels stay in the first cache."""

        def group(tile: Expr, tiles: int) -> None:
            whole = v.bind(tirx.truncdiv(count, v.i64(tile_rows)))
            v.loop(whole, lambda i: self._tile(v.bind(first + i * tile_rows), tile_rows, tile, tiles))
            rest = v.bind(count - whole * tile_rows)
            v.loop(rest, lambda i: self._tile(v.bind(first + whole * tile_rows + i), 1, tile, tiles))

        whole = quotient(self.tiles, wide)
        v.loop(whole, lambda g: group(v.bind(g * wide), wide))
        if wide > 1:
            v.loop(self.tiles - whole * wide, lambda i: group(v.bind(whole * wide + i), 1))

    def _tile(self, row: Expr, rows: int, tile: Expr, tiles: int) -> None:
        """One register tile."""
        dot, lanes = self.dot, self.dot.lanes
        keys = [(r, i, p) for r in range(rows) for i in range(tiles) for p in range(dot.parts)]
        sums = {key: v.register(lanes, "int32") for key in keys}
        row_sums = [v.register(lanes, "int32") for _ in range(rows)] if self.shift else []
        for _, i, p in keys[: tiles * dot.parts]:
            start = v.bind(v.load(self.added, [(self.matrix + tile + i) * LANES + p * lanes], lanes))
            for r in range(rows):
                v.put(sums[r, i, p], start, lanes)
        for held in row_sums:
            v.put(held, v.full(0, "int32", lanes), lanes)
        base = [v.held_index(self.a_start + (row + r) * self.channels) for r in range(rows)]
        one = dot.levels(v.full(1, "uint8", dot.bytes)) if self.shift else ()

        def step(index: Expr, word: Callable[[Expr], Expr]) -> None:
            at = v.bind(((self.matrix + tile) * self.steps + index) * VECTOR_BYTES)
            levels = {(i, p): dot.levels(v.bind(v.load(
                self.packed, [at + i * (self.steps * VECTOR_BYTES) + p * dot.bytes], dot.bytes)))
                for i in range(tiles) for p in range(dot.parts)}  # fmt: skip
            for r in range(rows):
                codes = dot.splat(word(v.bind(base[r] + index * GROUP)))
                for (i, p), level in levels.items():
                    v.put(sums[r, i, p], dot.dot(v.get(sums[r, i, p], lanes), codes, level), lanes)
                if self.shift:
                    v.put(row_sums[r], dot.dot(v.get(row_sums[r], lanes), codes, one), lanes)

        whole = quotient(self.channels, GROUP)
        v.loop(whole, lambda s: step(s, self._four))
        rest = self.channels - whole * GROUP
        v.loop(self.steps - whole, lambda s: step(v.bind(whole + s), partial(self._last, rest)))
        self._finish(row, tile, sums, row_sums)

    def _four(self, at: Expr) -> Expr:
        return v.bind(v.reinterpret(v.load(self.a, [at], GROUP), "int32", 1))

    def _last(self, rest: Dim, at: Expr) -> Expr:
        """The last codes of a row, and behind them what is fed as 0."""
        word: Expr = tirx.const(0, "int32")
        for j in range(GROUP):
            pad = tirx.const(signed_word(((-self.dot.offset) % 256) << (8 * j)), "int32")
            if isinstance(rest, int):
                word = word | (self._moved(at, j) if j < rest else pad)
            else:
                word = word | tirx.if_then_else(v.i64(j) < rest, self._moved(at, j), pad)
        return v.bind(word)

    def _moved(self, at: Expr, j: int) -> Expr:
        """Code j behind `at` as byte j of a word."""
        return tirx.shift_left(tirx.Cast("int32", self.a[at + j]), tirx.const(8 * j, "int32"))

    def _finish(self, row: Expr, tile: Expr, sums: dict[tuple[int, int, int], Buffer], row_sums: list[Buffer]) -> None:
        dot, lanes, way = self.dot, self.dot.lanes, self.spec.epilogue
        made = [None if way is None else prepare(way, dot, self.numbers, v.i64(p * lanes)) for p in range(dot.parts)]
        for (r, i, p), held in sums.items():
            acc = v.get(held, lanes)
            if row_sums:
                acc = acc + v.get(row_sums[r], lanes) * v.full(self.shift, "int32", lanes)
            acc = v.bind(acc)
            column = v.bind((tile + i) * LANES + p * lanes)
            to = v.bind(self.out_start + (row + r) * self.columns + column)
            make = made[p]
            for out, kind in self.outs:
                value = acc if kind == "int32" or make is None else v.bind(v.cast(v.bind(make(acc)), kind, lanes))
                self._store(out, kind, to, column, value)

    def _store(self, out: Buffer, kind: str, to: Expr, column: Expr, value: Expr) -> None:
        """Store the columns that exist."""
        lanes = self.dot.lanes
        if isinstance(self.columns, int) and self.columns % LANES == 0:
            v.store(out, [to], value, lanes)
            return
        room = v.bind(v.i64(self.columns) - column)

        def some() -> None:
            held = v.register(lanes, kind)
            v.put(held, value, lanes)
            for lane in range(lanes):
                v.when(v.i64(lane) < room, partial(self._one, out, to, held, lane))

        v.when(room >= v.i64(lanes), lambda: v.store(out, [to], value, lanes), some)

    def _one(self, out: Buffer, to: Expr, held: Buffer, lane: int) -> None:
        v.store(out, [to + lane], v.load(held, [lane], 1), 1)
