"""Integer matrix product and convolution: int8 activations quantized at run time by packed k-bit weights.

One generator for every k, grid, block and instruction set. For output row m, channel n, and each (tap t, block b)
in order:

    acc[m, n] = sum over c in the block of q[row(m, t), c] * (grid[code[n, t, c]] - grid[zero_point])   int32, exact
    out[m, n] += f32(acc) * (act_scale[row(m, t), b] * weight_scale[n, t, b])                          float32

With offsets the integer of a weight is its code, and each block adds a second term after the first,

    out[m, n] += (f32(sum of q) * act_scale[row(m, t), b]) * offset[n, t, b]                                float32

With one activation scale a row and integer block scales (`factors`) the sum over the blocks of a tap is exact too:

    total[m, n] = sum over blocks of acc[m, n] * factor[n, t, b]                                     int32, exact
    out[m, n] += f32(total) * (act_scale[row(m, t)] * weight_scale[n])                               float32

Each product that is added may be one fused multiply-add. Then the bias is added and the result clamped. row(m, t) is m
for a matrix product; for a convolution it is the pixel of tap t in an activation padded beforehand (`dynamic_quantize`
writes the border), so nothing is skipped.
Levels are fed with a bias (see `isa.Feed`): acc starts at -bias * sum(q) of the block instead of 0.
An instruction set may sum in 16 bits first (`Isa.chain`), two lanes a channel. Where a whole block fits (`one_chain`),
each lane starts at half of -bias * sum(q), and an integer block scale multiplies the lanes as they are widened.
Results do not depend on the number of threads: a row and tile are always summed by one thread in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import tirx

from kbitc.quant.packing import GROUP, STEPS, UNIT, per_vector
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ahead import ahead_of
from kbitc.targets.kernels.byte_dot import signed_word
from kbitc.targets.kernels.isa import Feed, Isa, level_bytes, stored_bias, unit_codes
from kbitc.targets.kernels.packed import WeightSpec, declare_bias, declare_weight
from kbitc.targets.kernels.qfold import Arguments, Fold, Place
from kbitc.targets.kernels.qtiled import LEAST_ROWS, QTiled, takes
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.kernels.tasks import row_tasks
from kbitc.targets.kernels.tiled import lines_of
from kbitc.targets.lower.contraction import PostFunction
from kbitc.targets.target import ACTIVATION_LEVEL

Expr = Any
Buffer = Any
# By row, 16-channel tile and part of it.
Sums = dict[tuple[int, int, int], Expr]
INT16_LIMIT = 2**15 - 1
# Blocks of up to this many steps are unrolled whole; longer ones loop over their units.
UNROLLED_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class QgemmSpec(WeightSpec):
    """What a kernel computes, apart from the instruction set: the weight, and

    Attributes:
        rows: where the rows of the activation lie and how many there are; activation scales have the weight's blocks.
        row_scales: activations have one scale a row instead.
        bias: a float32 [Np] is added.
        post: clamp after the bias.
        accumulators: also write the int32 accumulators [M, T * CB, N].
    """

    rows: MatmulRows | ConvRows
    row_scales: bool = False
    bias: bool = False
    post: PostFunction | None = None
    accumulators: bool = False

    @property
    def activation_block(self) -> int:
        """Channels of one activation scale."""
        return self.channels if self.row_scales else self.block

    @property
    def activation_blocks(self) -> int:
        """Activation scales of a row."""
        return 1 if self.row_scales else self.blocks


@dataclass
class _Tile:
    """One register tile: some rows by some 16-channel tiles.

    `base` holds the row number in the activation of each row at tap 0, `out_rows` its row in the output,
    `first` the first 16-channel tile, `sums` the float accumulators by (row, tile, part), `totals` those in int32.
    """

    base: list[Expr]
    out_rows: list[Expr]
    first: Expr
    tiles: int
    sums: dict[tuple[int, int, int], Buffer] = field(default_factory=dict)
    totals: dict[tuple[int, int, int], Buffer] = field(default_factory=dict)

    def row(self, r: int, of: dict[tuple[int, int, int], Any]) -> dict[Place, Any]:
        """What belongs to one row, by (tile, part)."""
        return {key[1:]: held for key, held in of.items() if key[0] == r}


def make_qgemm(spec: QgemmSpec, isa: Isa, name: str) -> Any:
    """The PrimFunc of a specification.

    Arguments in order: codes int8 [*rows, Cp], act_scales f32 [*rows, CB] or [*rows, 1], sums int32 [*rows, CB],
    packed uint8 [Np/16, T, Cp/32, k, 64], scales [Np/16, T, CB, 16] or [Np/16, 1, 1, 16],
    factors uint8 [Np/16, T, CB, 16] (if any), zero points uint8 of the shape of factors or scales (if any),
    offsets like scales (if any), bias f32 [Np] (if any), out f32 [*out rows, N],
    accumulators int32 [*out rows, T * CB, N] (if asked for).
    """
    return v.kernel(name, lambda: _Generator(spec, isa).emit())


def pair_of(factors: Expr, lanes: int) -> Expr:
    """int32 numbers below 2^15 twice each as int16."""
    twice = factors | tirx.shift_left(factors, v.full(16, "int32", lanes))
    return v.bind(v.reinterpret(twice, "int16", 2 * lanes))


def halves(number: int) -> tuple[int, int]:
    """Two integers of about one size whose sum it is."""
    return number // 2, number - number // 2


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: QgemmSpec, isa: Isa) -> None:
        self.spec = spec
        self.isa = isa
        self.feed: Feed = isa.feed(spec.data_type)
        self.table: list[Expr] | None = None
        # What is fed too much for the integer of a weight; zero points take its place.
        self.excess = 0 if spec.zero_point else self.feed.bias + spec.origin

    def one_chain(self, steps: int) -> bool:
        """Whether the sums of a block of so many steps fit 16 bits, with half of -excess * sum(q) in each.

        Only what comes out must fit: int16 additions wrap. A lane sums two of the four channels of every step.
        """
        if not self.isa.chain(self.feed):
            return False
        own, (low, high) = GROUP // 2 * steps, self.feed.ends
        worst = max(own * (max(abs(low - h), abs(high - h)) + abs(h)) for h in halves(self.excess))
        return worst * ACTIVATION_LEVEL <= INT16_LIMIT

    def emit(self) -> None:
        """Arguments, then statements."""
        spec = self.spec
        dims = v.DimVars()
        self.rows = spec.rows.with_dims(dims)
        bind_views = self._arguments(dims)
        with v.root():
            self.args = bind_views()
            self.fold = Fold(spec, self.isa, self.args, stored_bias(spec.data_type) - self.feed.bias)
            lines = lines_of(self.rows, spec.padded_channels) if takes(spec, self.isa) else None
            if lines is None:
                self._dot_products(self.rows.least)
                return
            many = QTiled(spec, self.isa, self.args, self.rows, lines)
            if isinstance(self.rows.count, int) or self.rows.least >= LEAST_ROWS:
                many.emit()
            else:
                v.when(self.rows.count < v.i64(LEAST_ROWS), lambda: self._dot_products(0), many.emit)

    def _dot_products(self, least: int) -> None:
        """Register tiles of dot products in parallel."""
        isa, shape = self.isa, (self.isa.rows, self.isa.tiles)
        ahead = ahead_of([self.args.weight.packed, self.args.weight.scales])
        row_tasks(self.rows.count, shape, isa.few_tiles(self.feed), self.spec.output_tiles, self._tile, least, ahead)

    def _arguments(self, dims: v.DimVars) -> Callable[[], Arguments]:
        """Declare the arguments; what is returned makes the views of them."""
        spec, rows = self.spec, self.rows
        activation = (
            ("codes", spec.padded_channels, "int8"),
            ("act_scales", spec.activation_blocks, "float32"),
            ("sums", spec.blocks, "int32"),
        )
        given = [v.argument(name, (*rows.source_shape, width), dtype) for name, width, dtype in activation]
        weight, bias = declare_weight(spec), declare_bias(spec, spec.bias)
        out = v.argument("out", (*rows.out_shape, spec.outputs), "float32")
        each = (spec.taps * spec.blocks, spec.outputs)
        raw = v.argument("accumulators", (*rows.out_shape, *each), "int32") if spec.accumulators else None

        def views() -> Arguments:
            codes, act_scales, sums = (
                v.view(buffer, (rows.source_rows, width), dtype)
                for buffer, (_, width, dtype) in zip(given, activation, strict=True)
            )
            results = v.view(out, (rows.count, spec.outputs), "float32")
            accumulators = None if raw is None else v.view(raw, (rows.count, *each), "int32")
            return Arguments(codes, act_scales, sums, weight, bias, results, accumulators)

        return views

    def _tile(self, row: Expr, rows: int, first: Expr, tiles: int) -> None:
        """One register tile from zero to its results in memory."""
        table = self.feed.table
        self.table = None if table is None else [v.bind(part) for part in self.isa.table(table)]
        out_rows = [v.bind(row + r) for r in range(rows)]
        tile = _Tile([v.held_index(self.rows.base(m)) for m in out_rows], out_rows, first, tiles)
        lanes = self.isa.lanes
        for key in self._keys(tile):
            tile.sums[key] = v.register(lanes, "float32")
            v.put(tile.sums[key], v.full(0.0, "float32", lanes), lanes)
            if self.spec.factors:
                tile.totals[key] = v.register(lanes, "int32")
        v.loop(self.spec.taps, lambda tap: self._tap(tile, tap))
        self.fold.finish(first, [(row, tile.row(r, tile.sums)) for r, row in enumerate(out_rows)])

    def _keys(self, tile: _Tile) -> list[tuple[int, int, int]]:
        return [(r, i, p) for r in range(len(tile.base)) for i in range(tile.tiles) for p in range(self.isa.parts)]

    def _tap(self, tile: _Tile, tap: Expr) -> None:
        """All blocks of one tap. Blocks of an odd number of half units alternate in where they start."""
        spec = self.spec
        offset = self.rows.tap_offset(tap)
        source = [v.held_index(base + offset) for base in tile.base] if spec.taps > 1 else tile.base
        for held in tile.totals.values():
            v.put(held, v.full(0, "int32", self.isa.lanes), self.isa.lanes)
        body = _Block(self, tile, tap, source)
        halves, whole = spec.block // (UNIT // 2), spec.channels // spec.block
        if spec.block >= spec.channels:
            body.emit(v.i64(0), v.i64(0), spec.channels, lead_half=False)
        elif halves % 2 == 0:
            units = halves // 2
            v.loop(whole, lambda b: body.emit(b, v.bind(b * units), spec.block, lead_half=False))
        else:
            v.loop(whole // 2, lambda pair: self._pair(body, pair, halves))
            if whole % 2:
                body.emit(v.i64(whole - 1), v.i64((whole - 1) * halves // 2), spec.block, lead_half=False)
        rest = spec.channels % spec.block
        if rest and spec.block < spec.channels:
            body.emit(v.i64(whole), v.i64(whole * halves // 2), rest, lead_half=whole * halves % 2 == 1)
        if not tile.totals:
            return
        steps = self.fold.steps(tile.first, tile.tiles)
        for r, row in enumerate(source):
            totals = {place: v.get(tile.totals[r, *place], self.isa.lanes) for place in steps}
            self.fold.totals(steps, totals, row, tile.row(r, tile.sums))

    def _pair(self, body: _Block, pair: Expr, halves: int) -> None:
        """Two neighbouring blocks, the second of which starts in the middle of a unit."""
        start = v.bind(pair * halves)
        body.emit(v.bind(pair * 2), start, self.spec.block, lead_half=False)
        body.emit(v.bind(pair * 2 + 1), v.bind(start + halves // 2), self.spec.block, lead_half=True)


class _Block:
    """Emits the blocks of one tap for one register tile."""

    def __init__(self, generator: _Generator, tile: _Tile, tap: Expr, source: list[Expr]) -> None:
        self.g = generator
        self.tile = tile
        self.tap = tap
        self.source = source
        # Sums of codes that stay 2^k times too large where they lie in their byte.
        self.raised: Sums = {}
        # Whether the sums of the block are kept in 16 bits, two a channel.
        self.narrow = False

    def emit(self, block: Expr, unit: Expr, channels: int, *, lead_half: bool) -> None:
        """One block of `channels` channels that starts at the unit, or in its middle.

        Only steps that hold real channels are computed.
        """
        keys = self.g._keys(self.tile)
        lanes = self.g.isa.lanes
        steps = -(-channels // GROUP)
        offset = STEPS // 2 if lead_half else 0
        unrolled = steps + offset <= UNROLLED_STEPS
        self.narrow = unrolled and self.g.one_chain(steps)
        acc = {key: self._start(key[0], block) for key in keys}
        self.total = v.bind(self.g.args.sums[self.source[0], block])
        if unrolled:
            lane = ("int16", 2 * lanes) if self.narrow else ("int32", lanes)
            if self._raises(steps):
                self.raised = {key: v.full(0, *lane) for key in keys}
            for start in range(0, steps + offset, STEPS):
                acc = self._unit(acc, v.i64(unit) + start // STEPS, max(0, offset - start),
                                 min(STEPS, steps + offset - start))  # fmt: skip
            bits = v.full(self.g.spec.data_type.bits, *lane)
            for key, sums in self.raised.items():
                acc[key] = v.bind(acc[key] + tirx.shift_right(sums, bits))
        else:
            held = {key: v.register(lanes, "int32") for key in keys}
            if lead_half:
                acc = self._unit(acc, unit, offset, STEPS)
                unit, steps = v.i64(unit) + 1, steps - offset
            for key in keys:
                v.put(held[key], acc[key], lanes)

            def whole(i: Expr) -> None:
                after = self._unit({key: v.get(held[key], lanes) for key in keys}, v.bind(unit + i), 0, STEPS)
                for key in keys:
                    v.put(held[key], after[key], lanes)

            v.loop(steps // STEPS, whole)
            acc = {key: v.bind(v.get(held[key], lanes)) for key in keys}
            if steps % STEPS:
                acc = self._unit(acc, v.i64(unit) + steps // STEPS, 0, steps % STEPS)
        self._end(acc, block)

    def _raises(self, steps: int) -> bool:
        """Whether every second code of a byte is multiplied where it lies, which saves its shift.

        It takes a second accumulator, for which only the matrix-vector product has registers. No sum overflows int32:
        an unrolled block has at most 64 products of 255 by 127.
        """
        g = self.g
        plain = not g.isa.signed and g.feed.table is None and g.feed.shift == 0
        if not plain or len(self.source) > 1 or g.spec.data_type.bits not in g.isa.raised_bits:
            return False
        chain = g.isa.chain(self._raised_feed())
        return chain >= -(-steps // 2) if self.narrow else not g.isa.chain(g.feed)

    def _raised_feed(self) -> Feed:
        bits, (low, high) = self.g.spec.data_type.bits, self.g.feed.ends
        return replace(self.g.feed, shift=bits, ends=(low << bits, high << bits))

    def _start(self, row: int, block: Expr) -> Expr:
        """-excess * sum(q), in 16 bits halves of it that wrap."""
        lanes, excess = self.g.isa.lanes, self.g.excess
        if not excess:
            return v.full(0, "int16", 2 * lanes) if self.narrow else v.full(0, "int32", lanes)
        total = self.g.args.sums[self.source[row], block]
        if not self.narrow:
            return v.bind(v.splat(total * tirx.const(-excess, "int32"), lanes))
        low, high = (-half & 0xFFFF for half in halves(excess))
        both = v.reinterpret(v.full(signed_word(high << 16 | low), "int32", lanes), "int16", 2 * lanes)
        return v.bind(v.splat(tirx.Cast("int16", total), 2 * lanes) * both)

    def _unit(self, acc: Sums, unit: Expr, first: int, end: int) -> Sums:
        """Steps first .. end - 1 of one unit."""
        g, isa, tile = self.g, self.g.isa, self.tile
        acc, bits = dict(acc), g.spec.data_type.bits
        units = {
            (i, p): unit_codes(isa, bits, g.args.weight.packed, [tile.first + i, self.tap, unit], p)
            for i in range(tile.tiles)
            for p in range(isa.parts)
        }
        chain, pairs = 0 if self.narrow else isa.chain(g.feed), Sums()
        for step in range(first, end):
            activations = []
            for source in self.source:
                four = v.load(g.args.codes, [source, unit * UNIT + GROUP * step], GROUP)
                activations.append(isa.broadcast(v.bind(v.reinterpret(four, "int32", 1))))
            raised = bool(self.raised) and step % per_vector(bits) % 2 == 1
            feed, sums = (self._raised_feed(), self.raised) if raised else (g.feed, pairs if chain else acc)
            for (i, p), codes in units.items():
                levels = isa.split(v.bind(level_bytes(isa, feed, g.table, codes, step)), feed)
                for r, activation in enumerate(activations):
                    sums[r, i, p] = self._add(sums.get((r, i, p)), levels, activation, feed)
            if chain and ((step - first + 1) % chain == 0 or step == end - 1):
                for key, found in pairs.items():
                    acc[key] = v.bind(acc[key] + self._whole(found))
                pairs.clear()
            if len(self.source) > 1:
                # No sum of activations is so low. The same condition twice would be tested once.
                isa.keep_order(self.total == tirx.const(step - 2**31, "int32"))
        return acc

    def _add(self, sums: Expr | None, levels: tuple[Expr, ...], activation: tuple[Expr, ...], feed: Feed) -> Expr:
        """The sums with one more step, in 16 bits where the instruction set has such sums."""
        isa = self.g.isa
        if isa.chain(feed):
            return isa.narrow(sums, levels, activation, feed)
        return v.bind(isa.dot(sums, levels, activation))

    def _whole(self, pairs: Expr) -> Expr:
        """Sums of 16 bits as int32."""
        return self.g.isa.widened(pairs, v.full(1, "int16", 2 * self.g.isa.lanes))

    def _end(self, acc: dict[tuple[int, int, int], Expr], block: Expr) -> None:
        """Subtract zero points, scale, add to the sums; then what offsets add."""
        fold, tile = self.g.fold, self.tile
        numbers = fold.numbers(tile.first, tile.tiles, self.tap, block)
        held = tile.totals or tile.sums
        factors = self._pairs_of_factors(numbers.scales)
        for r, source in enumerate(self.source):
            sums = tile.row(r, acc)
            if factors:
                self._add_times(sums, factors, tile.row(r, tile.totals))
                continue
            exact = {place: v.bind(self._whole(found)) for place, found in sums.items()} if self.narrow else sums
            fold.row(numbers, exact, source, tile.out_rows[r], tile.row(r, held))

    def _pairs_of_factors(self, factors: dict[Place, Expr]) -> dict[Place, Expr]:
        """Factors that sums of 16 bits are multiplied by as they are widened; none where something comes between."""
        g, lanes = self.g, self.g.isa.lanes
        if not self.narrow or not g.spec.factors or g.spec.zero_point or g.spec.accumulators:
            return {}
        return {place: pair_of(factor, lanes) for place, factor in factors.items()}

    def _add_times(self, sums: dict[Place, Expr], factors: dict[Place, Expr], totals: dict[Place, Buffer]) -> None:
        """The sums of a row times the factors of the block to its totals."""
        isa = self.g.isa
        for place, factor in factors.items():
            v.put(totals[place], v.get(totals[place], isa.lanes) + isa.widened(sums[place], factor), isa.lanes)
