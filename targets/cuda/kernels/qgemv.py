"""Integer matrix-vector product with dp4a: up to four rows of int8 activations by packed k-bit weights.

A thread block owns one tile of 16 channels. Four threads side by side (a *slot*) read the 64 bytes of a code vector,
four channels each; slots walk along K. Integers of a block are complete before they are scaled:

    short blocks     a slot does whole blocks: slot i the blocks i, i + slots, ...
    long blocks      the eight slots of a warp share a block and add their int32 parts by shuffles
    one block        all slots share it, the parts are added by shuffles and through shared memory

The float sums of slots are then added in a fixed tree (lanes, then warps in order), so results are the same in every
run, but the order differs from the CPU kernels': int32 accumulators are equal, floats agree to rounding.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.cuda.intrin.dp4a import dp4a
from kbitc.targets.cuda.kernels import levels
from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.cuda.kernels.arguments import Arguments, declared, finish_value
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.qgemm import QgemmSpec

Expr = Any
Buffer = Any
MAX_ROWS = 4
QUAD = 4  # threads side by side in a slot, and channels of a thread
WARP_SLOTS = t.WARP // QUAD
MAX_WARPS = 8
LONGEST_SHORT_BLOCK = 4  # units that one slot does alone
UNROLLED_UNITS = 4


def make_qgemv(spec: QgemmSpec, name: str) -> Any:
    """The PrimFunc for a matrix product of at most `MAX_ROWS` rows (any number if symbolic); T must be 1.

    Arguments as `arguments.declared` has them.
    """

    def body() -> None:
        with declared(spec) as args:
            emit_qgemv(spec, args)

    return v.kernel(name, body)


def emit_qgemv(spec: QgemmSpec, args: Arguments) -> None:
    """Emit the launch of the kernel into the open function. A symbolic number of rows is a grid dimension."""
    count = args.rows.count
    rows = count if isinstance(count, int) and count <= MAX_ROWS else 1
    plan = _Plan(spec)
    grid = (spec.output_tiles, 1 if rows == count else count)
    with t.launch(grid, plan.warps * t.WARP) as ((tile, first_row), thread):
        _Thread(spec, args, plan, rows, tile, first_row, thread).emit()


class _Plan:
    """How the slots of a thread block share the blocks of a row.

    Attributes:
        kind: "short", "long" or "one", see above.
        period: blocks after which a block starts at a unit again, 1 or 2; a slot does that many at a time.
        period_units: units in a period.
        warps: of a thread block.
    """

    def __init__(self, spec: QgemmSpec) -> None:
        self.units = spec.padded_channels // UNIT
        self.period_units = math.lcm(spec.block, UNIT) // UNIT
        self.period = self.period_units * UNIT // spec.block
        if spec.blocks == 1:
            self.kind, work = "one", self.units
        elif self.period == 1 and self.period_units > LONGEST_SHORT_BLOCK:
            self.kind, work = "long", spec.blocks * WARP_SLOTS
        else:
            self.kind, work = "short", -(-spec.blocks // self.period)
        self.warps = min(MAX_WARPS, max(1, -(-work // WARP_SLOTS)))
        self.slots = self.warps * WARP_SLOTS


class _Thread:
    """Emits what a thread does."""

    def __init__(
        self, spec: QgemmSpec, args: Arguments, plan: _Plan, rows: int, tile: Expr, first_row: Expr, thread: Expr
    ) -> None:
        self.spec, self.args, self.plan, self.rows = spec, args, plan, rows
        self.tile, self.first_row = tile, first_row
        self.thread = thread
        self.quad, self.slot = v.bind(thread % QUAD), v.bind(thread // QUAD)
        self.feed = levels.feed_of(spec.data_type)
        bits = spec.data_type.bits
        self.packed = t.view(args.packed, (spec.output_tiles, plan.units, bits, LANES), "uint32")
        self.codes = t.view(args.codes, (args.rows.source_rows, spec.padded_channels // GROUP), "int32")
        self.keys = [(r, lane) for r in range(rows) for lane in range(QUAD)]
        self.acc = t.local(len(self.keys), "int32")
        self.sums = t.local(len(self.keys), "float32")

    def emit(self) -> None:
        """Walk K, add up, store."""
        for i in range(len(self.keys)):
            v.store(self.sums, [i], tirx.const(0.0, "float32"), 1)
        {"short": self._short, "long": self._long, "one": self._one}[self.plan.kind]()
        if self.plan.kind != "one":
            self._add_slots()

    def _clear(self) -> None:
        for i in range(len(self.keys)):
            v.store(self.acc, [i], tirx.const(0, "int32"), 1)

    def _short(self) -> None:
        """A slot does whole periods of blocks."""
        plan, spec = self.plan, self.spec
        periods = -(-spec.blocks // plan.period)

        def one(turn: Expr) -> None:
            period = v.bind(turn * plan.slots + self.slot)
            v.when(period < v.i64(periods), lambda: self._period(period))

        v.loop(-(-periods // plan.slots), one)

    def _period(self, period: Expr) -> None:
        """The blocks of one period: steps of the second one may begin in the middle of a unit."""
        plan, spec = self.plan, self.spec
        steps = spec.block // GROUP
        first = v.bind(period * plan.period_units)
        for k in range(plan.period):
            block = v.bind(period * plan.period + k)

            def body(k: int = k, block: Expr = block) -> None:
                self._clear()
                begin, end = k * steps, (k + 1) * steps
                for unit in range(begin // STEPS, -(-end // STEPS)):
                    low, high = max(0, begin - unit * STEPS), min(STEPS, end - unit * STEPS)
                    self._unit_if_real(v.bind(first + unit), low, high)
                self._scale(block)

            v.when(block < v.i64(spec.blocks), body) if k else body()

    def _unit_if_real(self, unit: Expr, low: int, high: int) -> None:
        """The last period may be short of units."""
        if self.plan.units % self.plan.period_units == 0:
            self._unit(unit, low, high)
        else:
            v.when(unit < v.i64(self.plan.units), lambda: self._unit(unit, low, high))

    def _long(self) -> None:
        """The slots of a warp share a block; every warp takes the next block in turn."""
        plan, spec = self.plan, self.spec
        warp = v.bind(self.thread // t.WARP)
        lane_slot = v.bind(self.slot % WARP_SLOTS)

        def one(turn: Expr) -> None:
            # All lanes of a warp take the same branch.
            block = v.bind(turn * plan.warps + warp)
            v.when(block < v.i64(spec.blocks), lambda: shared_block(block))

        def shared_block(block: Expr) -> None:
            self._clear()
            first = v.bind(block * plan.period_units)
            self._stride(first, v.bind(t.at_most(first + plan.period_units, plan.units)), lane_slot, WARP_SLOTS,
                         plan.period_units)  # fmt: skip
            for i in range(len(self.keys)):
                v.store(self.acc, [i], t.sum_lanes(v.bind(self.acc[i]), QUAD, WARP_SLOTS, "int32"), 1)
            v.when(lane_slot == v.i64(0), lambda: self._scale(block))

        v.loop(-(-spec.blocks // plan.warps), one)

    def _one(self) -> None:
        """One block for the whole row: integers of all warps are added before the only float operations."""
        plan = self.plan
        self._clear()
        self._stride(v.i64(0), v.i64(plan.units), self.slot, plan.slots, plan.units)
        parts = t.shared((plan.warps * len(self.keys) * QUAD,), "int32")
        self._gather(self.acc, parts, "int32")

        def finish() -> None:
            self._clear()
            for w in range(plan.warps):
                for i in range(len(self.keys)):
                    v.store(self.acc, [i], self.acc[i] + parts[self._place(v.i64(w), i)], 1)
            self._scale(v.i64(0))
            self._store_out()

        v.when(self.thread < v.i64(QUAD), finish)

    def _stride(self, first: Expr, end: Expr, start: Expr, step: int, most: int) -> None:
        """Units first + start, + step, ... below end."""

        def one(turn: Expr) -> None:
            unit = v.bind(first + turn * step + start)
            v.when(unit < end, lambda: self._unit(unit, 0, STEPS))

        v.loop(-(-most // step), one)

    def _unit(self, unit: Expr, low: int, high: int) -> None:
        """Steps low .. high - 1 of a unit for four channels and all rows."""
        bits = self.spec.data_type.bits
        words = t.local(bits * QUAD, "uint32")
        for k in range(bits):
            loaded = v.load(self.packed, [self.tile, unit, k, self.quad * QUAD], QUAD)
            v.store(words, [k * QUAD], loaded, QUAD)
        activations = []
        for r in range(self.rows):
            held = t.local(STEPS, "int32")
            for half in range(low // QUAD, -(-high // QUAD)):
                loaded = v.load(self.codes, [self.first_row + r, unit * STEPS + half * QUAD], QUAD)
                v.store(held, [half * QUAD], loaded, QUAD)
            activations.append(held)
        for lane in range(QUAD):

            def word(k: int, lane: int = lane) -> Expr:
                return words[k * QUAD + lane]

            codes = UnitCodes(bits, word)
            for pair in range(low // 2, high // 2):
                for e, fed in enumerate(levels.step_pair(self.spec.data_type, codes, pair)):
                    level = v.bind(tirx.op.reinterpret("int32", fed))
                    for r in range(self.rows):
                        place = self.keys.index((r, lane))
                        total = dp4a(level, activations[r][2 * pair + e], self.acc[place])
                        v.store(self.acc, [place], total, 1)

    def _scale(self, block: Expr) -> None:
        """Take bias or zero point off the complete integers of a block, scale them, add them to the float sums.

        Then what offsets add.
        """
        spec, args = self.spec, self.args
        where = [self.tile, v.i64(0), block if spec.scale_per_block else v.i64(0)]
        for r in range(self.rows):
            row = self.first_row + r
            act = v.bind(args.act_scales[row, v.i64(0) if spec.row_scales else block])
            total = v.bind(args.sums[row, block])
            summed = v.bind(tirx.Cast("float32", total) * act) if spec.offset else None
            for lane in range(QUAD):
                i = self.keys.index((r, lane))
                channel = self.quad * QUAD + lane
                bias = self.feed.bias + spec.origin
                zero: Expr = args.zero_level(where, channel) if spec.zero_point else tirx.const(bias, "int32")
                exact = self.acc[i]
                if spec.zero_point or bias:
                    exact = v.bind(exact - zero * total)
                if args.accumulators is not None:
                    self._store(args.accumulators, (block,), row, channel, exact)
                weight = tirx.Cast("float32", args.scales[(*where, channel)])
                v.store(self.sums, [i], self.sums[i] + tirx.Cast("float32", exact) * (act * weight), 1)
                if args.offsets is not None:
                    offset = tirx.Cast("float32", args.offsets[(*where, channel)])
                    v.store(self.sums, [i], self.sums[i] + summed * offset, 1)

    def _place(self, warp: Expr, i: int) -> Expr:
        """Where warp `warp` leaves value i of this thread's quad in shared memory."""
        return (warp * len(self.keys) + i) * QUAD + self.quad

    def _gather(self, values: Buffer, parts: Buffer, dtype: str) -> None:
        """Add values over the slots of each warp and leave one sum a warp in shared memory."""
        for i in range(len(self.keys)):
            v.store(values, [i], t.sum_lanes(v.bind(values[i]), QUAD, WARP_SLOTS, dtype), 1)

        def leave() -> None:
            for i in range(len(self.keys)):
                v.store(parts, [self._place(self.thread // t.WARP, i)], values[i], 1)

        v.when(self.thread % t.WARP < v.i64(QUAD), leave)
        t.barrier()

    def _add_slots(self) -> None:
        """Float sums: over the lanes of a warp, then over warps in order."""
        parts = t.shared((self.plan.warps * len(self.keys) * QUAD,), "float32")
        self._gather(self.sums, parts, "float32")

        def finish() -> None:
            for i in range(len(self.keys)):
                total: Expr = parts[self._place(v.i64(0), i)]
                for w in range(1, self.plan.warps):
                    total = v.bind(total + parts[self._place(v.i64(w), i)])
                v.store(self.sums, [i], total, 1)
            self._store_out()

        v.when(self.thread < v.i64(QUAD), finish)

    def _store_out(self) -> None:
        for i, (r, lane) in enumerate(self.keys):
            channel = self.quad * QUAD + lane
            index = v.bind(self.tile * LANES + channel)
            value = finish_value(self.args, self.spec, self.sums[i], index)
            self._store(self.args.out, (), self.first_row + r, channel, value)

    def _store(self, buffer: Buffer, middle: tuple[Expr, ...], row: Expr, channel: Expr, value: Expr) -> None:
        """Store one element if it is a real channel."""
        index = self.tile * LANES + channel
        if self.spec.outputs % LANES == 0:
            v.store(buffer, [row, *middle, index], value, 1)
        else:
            v.when(index < v.i64(self.spec.outputs), lambda: v.store(buffer, [row, *middle, index], value, 1))
