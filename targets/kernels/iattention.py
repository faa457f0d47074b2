"""Attention of codes in one kernel, head by head: the integers of the separate kernels.

    s[m, n] = float32(sum over c of (q[m, c] - q_zero) (k[n, c] - k_zero)) * step, then scale and mask, and
    p[m, n] = softmax of s over n, both as in `fattention.py`
    f[m, n] = QuantizeLinear(p[m, n], share_scale, share_zero)
    out[m, d] = requantization of sum over n of (f[m, n] - share_zero) (v[n, d] - v_zero)

Sums of codes are those of `ibatch.py`: keys and values become levels, less 128, in the layout of a four-way dot
product, once a task; columns and rows add what that leaves out. Scores of some rows and their codes stay in buffers of
the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tvm import tirx

from kbitc.errors import InternalError
from kbitc.quant.packing import GROUP, LANES, VECTOR_BYTES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.batch import quotient
from kbitc.targets.kernels.byte_dot import ByteDot
from kbitc.targets.kernels.fattention import KEY_TILES, AttentionKernel, lanes_below, scratch, tree, turned
from kbitc.targets.kernels.ftile import Registers
from kbitc.targets.kernels.ibatch import MIDDLE, levels_of_rows, ones
from kbitc.targets.kernels.requantize import Epilogue, arguments, prepare
from kbitc.targets.lower import scalar
from kbitc.targets.lower.contraction import Attention

Expr = Any
Buffer = Any
Dim = Any
#: Channels of keys and columns of values come in multiples of that.
CHANNELS = 16
MOST_ROWS = 8
TALL_ROWS = 4


def make_code_attention(spec: Attention, way: Epilogue, registers: Registers, dot: ByteDot, name: str) -> Any:
    """The PrimFunc: q, k, v u8, the mask f32 if there is one, the numbers of the requantization [16], out u8."""
    return v.kernel(name, lambda: _CodeKernel(spec, way, registers, dot).emit())


class _CodeKernel(AttentionKernel):
    """What codes do otherwise than float32."""

    dtype = "uint8"

    def __init__(self, spec: Attention, way: Epilogue, registers: Registers, dot: ByteDot) -> None:
        if spec.codes is None:
            raise InternalError("an attention of codes without their numbers")
        self.codes, self.way, self.dot = spec.codes, way, dot
        #: Steps become scores before they are scaled; where nothing scales them, that is the scale.
        self.step: float | None = self.codes.step
        if spec.scale == 1.0 and not spec.divide:
            spec, self.step = replace(spec, scale=self.codes.step), None
        super().__init__(spec, registers)

    def _tile_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """See the base class."""
        keys = self.spec.keys
        tiles = KEY_TILES if not isinstance(keys, int) else max(1, min(KEY_TILES, -(-keys // LANES)))
        return self._shape(tiles), self._shape(min(KEY_TILES, self.value_tiles))

    def _shape(self, tiles: int) -> tuple[int, int]:
        """Rows, a power of two, and 16-column tiles of a register tile, as in `ibatch.py`."""
        dot = self.dot
        while True:
            width = tiles * dot.parts
            rows = (dot.registers - dot.ahead - width * dot.held) // width
            if rows >= TALL_ROWS or tiles == 1:
                return 1 << (max(1, min(MOST_ROWS, rows)).bit_length() - 1), tiles
            tiles -= 1

    def _numbers(self) -> None:
        self.numbers = arguments(self.way, LANES)

    # Operands

    def _lay_out_keys(self) -> None:
        """packed[t, step, j, i] = level of k[16 t + j, 4 step + i]; keys that do not exist repeat the last."""
        words = self.spec.channels // GROUP
        size = next(lanes for lanes in (16, 8, 4) if lanes <= self.dot.lanes and words % lanes == 0)
        self.packed = scratch(self.width * self.spec.channels, "uint8")
        self.key_sums = scratch(self.width, "int32")
        self.query_sums = scratch(self.block, "int32") if self.codes.k_zero != MIDDLE else None

        def part(t: Expr, p: Expr) -> None:
            key = v.bind(t * LANES + p * size)
            starts = [
                v.bind(self.k_start + tirx.min(key + j, v.i64(self.keys - 1)) * self.k.row_stride) for j in range(size)
            ]
            target = v.bind(t * (words * VECTOR_BYTES) + p * (size * GROUP))

            def square(i: Expr) -> None:
                at = v.bind(i * size)
                codes = [v.load(self.k.buffer, [start + at * GROUP], size * GROUP) for start in starts]
                columns = turned([v.bind(v.reinterpret(code, "int32", size)) for code in codes], size)
                for j, column in enumerate(columns):
                    levels = v.reinterpret(column, "uint8", size * GROUP) ^ v.full(MIDDLE, "uint8", size * GROUP)
                    v.store(self.packed, [target + (at + j) * VECTOR_BYTES], v.bind(levels), size * GROUP)

            v.loop(words // size, square)

        def tile(t: Expr) -> None:
            v.loop(LANES // size, partial(part, t))
            shift = self.spec.channels * (MIDDLE - self.codes.k_zero)
            self._add_up(self.packed, t, words, tirx.const(shift, "int32"), self.codes.q_zero, self.key_sums)

        v.loop(self.key_vectors, tile)

    def _lay_out_values(self) -> None:
        """values[t, step, j, i] = level of v[4 step + i, 16 t + j]; values that do not exist are levels of 0."""
        self.steps = v.held_index(tirx.truncdiv(v.i64(self.keys) + (GROUP - 1), v.i64(GROUP)))
        self.values = scratch(self.key_vectors * (LANES // GROUP) * self.value_tiles * VECTOR_BYTES, "uint8")
        self.value_sums = scratch(self.value_tiles * LANES, "int32")
        self.shares = scratch(self.width * self.block, "uint8")
        self.share_sums = scratch(self.block, "int32") if self.codes.v_zero != MIDDLE else None

        def row(n: Expr, t: Expr) -> Expr:
            return v.load(self.v.buffer, [self.v_start + n * self.v.row_stride + t * LANES], LANES)

        def some(n: Expr, t: Expr) -> Expr:
            held = v.register(LANES, "uint8")
            v.put(held, v.full(MIDDLE, "uint8", LANES), LANES)
            v.when(n < v.i64(self.keys), lambda: v.put(held, row(n, t), LANES))
            return v.bind(v.get(held, LANES))

        def step(load: Callable[[Expr, Expr], Expr], t: Expr, s: Expr) -> None:
            levels = levels_of_rows([v.bind(load(v.bind(s * GROUP + j), t)) for j in range(GROUP)])
            v.store(self.values, [(t * self.steps + s) * VECTOR_BYTES], levels, VECTOR_BYTES)

        def tile(t: Expr) -> None:
            whole = quotient(self.keys, GROUP)
            v.loop(whole, partial(step, row, t))
            v.loop(self.steps - whole, lambda i: step(some, t, v.bind(whole + i)))
            shift = tirx.Cast("int32", v.i64(self.keys)) * tirx.const(MIDDLE - self.codes.v_zero, "int32")
            self._add_up(self.values, t, self.steps, v.bind(shift), self.codes.share_zero, self.value_sums)

        v.loop(self.value_tiles, tile)

    def _add_up(self, packed: Buffer, tile: Expr, steps: Dim, shift: Expr, zero: int, sums: Buffer) -> None:
        """sums[16 t + j] = -(zero + offset) * (sum of the levels of column j of tile t + shift)."""
        dot, lanes = self.dot, self.dot.lanes
        one = dot.splat(ones(dot))
        held = [v.register(lanes, "int32") for _ in range(dot.parts)]
        for register in held:
            v.put(register, v.splat(shift, lanes), lanes)
        at = v.bind(tile * (steps * VECTOR_BYTES))

        def step(s: Expr) -> None:
            for p, register in enumerate(held):
                levels = v.bind(v.load(packed, [at + s * VECTOR_BYTES + p * dot.bytes], dot.bytes))
                v.put(register, dot.dot(v.get(register, lanes), one, dot.levels(levels)), lanes)

        v.loop(steps, step)
        for p, register in enumerate(held):
            total = v.get(register, lanes) * v.full(-(zero + dot.offset), "int32", lanes)
            v.store(sums, [tile * LANES + p * lanes], v.bind(total), lanes)

    # Rows

    def _scores(self, row: Expr, rows: Expr, tile_rows: int) -> None:
        """As for float32, behind the sums of the queries."""
        if self.query_sums is not None:
            v.loop(rows, partial(self._query_sum, self.query_sums, row))
        super()._scores(row, rows, tile_rows)

    def _query_sum(self, sums: Buffer, row: Expr, r: Expr) -> None:
        """sums[r] = (128 - k_zero) * sum of what is fed of query row + r."""
        start = v.bind(self.q_start + (row + r) * self.q.row_stride)
        total: Expr = v.full(0, "int32", CHANNELS)
        for c in range(0, self.spec.channels, CHANNELS):
            total = total + v.cast(v.load(self.q.buffer, [start + c], CHANNELS), "int32", CHANNELS)
        fed = tree(total, lambda a, b: a + b) + tirx.const(self.spec.channels * self.dot.offset, "int32")
        v.store(sums, [r], fed * tirx.const(MIDDLE - self.codes.k_zero, "int32"), 1)

    def _score_tile(self, row: Expr, r: Expr, rows: int, vector: Expr, tiles: int, real: Expr | None) -> None:
        """See the base class."""
        lanes, words = self.lanes, self.spec.channels // GROUP
        starts = [v.bind(self.q_start + (row + r + i) * self.q.row_stride) for i in range(rows)]
        sums = _Sums(self.dot, rows, tiles, self.key_sums, vector, self.query_sums, r)
        at = v.bind(vector * (words * VECTOR_BYTES))
        sums.add(words, self.q.buffer, starts, self.packed, lambda t, s: at + (t * words + s) * VECTOR_BYTES)
        for i in range(rows):
            key = v.bind(vector * LANES)
            target = v.bind((r + i) * self.width + key)
            mask = None if self.mask is None else v.bind(self.mask_start + (row + r + i) * self.mask.row_stride + key)
            for t in range(tiles):
                for p in range(self.dot.parts):
                    place = t * LANES + p * lanes
                    value = v.cast(sums.value((i, t, p)), "float32", lanes)
                    if self.step is not None:
                        value = value * v.full(self.step, "float32", lanes)
                    value = self._masked(v.bind(value), None if mask is None else mask + place, p, real)
                    v.store(self.scores, [target + place], value, lanes)

    def _shares(self, r: Expr, start: Expr, inverse: Expr) -> None:
        """shares[r] = codes of scores[r] times the inverse; those of keys that do not exist are fed as 0."""
        pad = v.full((-self.dot.offset) % 256, "int32", LANES)
        total = v.register(LANES, "int32")
        v.put(total, v.full(0, "int32", LANES), LANES)

        def some(i: Expr, inside: Expr | None) -> None:
            at = v.bind(start + i * LANES)
            value = v.bind(v.load(self.scores, [at], LANES) * inverse)
            code = _code(value, self.codes.share_scale, self.codes.share_zero)
            if inside is not None:
                code = v.bind(tirx.Select(inside, code, pad))
            v.put(total, v.get(total, LANES) + code, LANES)
            v.store(self.shares, [at], v.cast(code, "uint8", LANES), LANES)

        full = quotient(self.keys, LANES)
        rest = self.keys - full * LANES
        v.loop(full, lambda i: some(i, None))
        v.when(
            rest > 0 if isinstance(rest, int) else rest > v.i64(0),
            lambda: some(v.bind(v.i64(full)), lanes_below(v.i64(rest), 0, LANES)),
        )
        if self.share_sums is not None:
            width = tirx.Cast("int32", v.i64(self.width)) * tirx.const(self.dot.offset, "int32")
            fed = tree(v.get(total, LANES), lambda a, b: a + b) + width
            v.store(self.share_sums, [r], fed * tirx.const(MIDDLE - self.codes.v_zero, "int32"), 1)

    def _value_tile(self, row: Expr, r: Expr, rows: int, first: int, tiles: int) -> None:
        dot, lanes = self.dot, self.lanes
        starts = [v.bind((r + i) * self.width) for i in range(rows)]
        sums = _Sums(dot, rows, tiles, self.value_sums, v.i64(first), self.share_sums, r)
        bases = [v.bind(self.steps * ((first + t) * VECTOR_BYTES)) for t in range(tiles)]
        sums.add(self.steps, self.shares, starts, self.values, lambda t, s: bases[t] + s * VECTOR_BYTES)
        made = [prepare(self.way, dot, self.numbers, v.i64(p * lanes)) for p in range(dot.parts)]
        for i in range(rows):
            at = v.bind(self.out_start + (row + r + i) * self.out.row_stride)
            for t in range(tiles):
                for p in range(dot.parts):
                    codes = v.bind(made[p](v.bind(sums.value((i, t, p)))))
                    place = (first + t) * LANES + p * lanes
                    v.store(self.out.buffer, [at + place], v.bind(v.cast(codes, "uint8", lanes)), lanes)


class _Sums:
    """The int32 sums of one register tile by (row, 16-column tile, part), from what columns and rows add on."""

    def __init__(
        self, dot: ByteDot, rows: int, tiles: int, columns: Buffer, first: Expr, row_sums: Buffer | None, r: Expr
    ) -> None:
        self.dot, self.rows, self.tiles = dot, rows, tiles
        lanes = dot.lanes
        keys = [(i, t, p) for i in range(rows) for t in range(tiles) for p in range(dot.parts)]
        self.held = {key: v.register(lanes, "int32") for key in keys}
        added = None if row_sums is None else [v.bind(v.splat(row_sums[r + i], lanes)) for i in range(rows)]
        for t in range(tiles):
            for p in range(dot.parts):
                start = v.bind(v.load(columns, [(first + t) * LANES + p * lanes], lanes))
                for i in range(rows):
                    v.put(self.held[i, t, p], start if added is None else start + added[i], lanes)

    def value(self, key: tuple[int, int, int]) -> Expr:
        """The vector of an accumulator."""
        return v.get(self.held[key], self.dot.lanes)

    def add(
        self, steps: Dim, codes: Buffer, starts: Sequence[Expr], packed: Buffer, place: Callable[[int, Expr], Expr]
    ) -> None:
        """Add codes[starts[i] + 4 step ...] times packed[place(t, step) ...], four at a time."""
        dot, lanes = self.dot, self.dot.lanes
        columns = [(t, p) for t in range(self.tiles) for p in range(dot.parts)]

        def one(s: Expr) -> None:
            levels = {
                (t, p): dot.levels(v.bind(v.load(packed, [place(t, s) + p * dot.bytes], dot.bytes))) for t, p in columns
            }
            for i, start in enumerate(starts):
                word = v.bind(v.reinterpret(v.load(codes, [start + s * GROUP], GROUP), "int32", 1))
                fed = dot.splat(word)
                for (t, p), level in levels.items():
                    v.put(self.held[i, t, p], dot.dot(v.get(self.held[i, t, p], lanes), fed, level), lanes)

        v.loop(steps, one)


def _code(value: Expr, scale: float, zero: int) -> Expr:
    """QuantizeLinear of 16 float32 numbers as int32 codes, operation by operation that of `scalar.rounded_code`."""
    limit, rounding = float(1 << 21), float(scalar.ROUNDING)
    share = v.bind(value / v.full(scale, "float32", LANES))
    limited = tirx.max(tirx.min(share, v.full(limit, "float32", LANES)), v.full(-limit, "float32", LANES))
    bits = v.reinterpret(v.bind(limited + v.full(rounding, "float32", LANES)), "int32", LANES)
    moved = v.bind(bits - v.full(scalar.ROUNDING_BITS - zero, "int32", LANES))
    return v.bind(tirx.max(tirx.min(moved, v.full(255, "int32", LANES)), v.full(0, "int32", LANES)))
