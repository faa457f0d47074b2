"""kbitc::DynamicQuantize on the GPU: a few lanes a block of a row. Same operations as kernels/dynamic_quantize.py.

    amax = max(max |x|, 1e-30)   inv = 127 / amax   scale = amax / 127   q = clip(round half to even(x * inv), +-127)

Multiplications and divisions are the rounding-to-nearest intrinsics, which nvcc never fuses or approximates, so codes
equal those of onnxruntime and of the CPU kernels bit for bit. Where a block has several sums, a second launch adds the
codes up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kbitc.quant.packing import UNIT, round_up
from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.dynamic_quantize import LEVEL, SMALLEST, QuantizeSpec

Expr = Any
Buffer = Any
BLOCK_THREADS = 128
# Up to this many values a lane are held in registers; more are read twice.
HELD = 8


@dataclass
class _Item:
    """One block of one row, done by `lanes` neighbouring lanes.

    Attributes:
        row, block: where results go; real: whether they are stored (the last thread block may be part full).
        source: row of x; inside: whether it is a real pixel.
        start: first channel; lane: of 0 .. lanes - 1; lanes: power of two up to 32.
    """

    row: Expr
    block: Expr
    real: Expr
    source: Expr
    inside: Expr
    start: Expr
    lane: Expr
    lanes: int


def make_quantize(spec: QuantizeSpec, name: str) -> Any:
    """The PrimFunc: x f32 [*lead, C] -> codes int8 [*out, Cp], scales f32 [*out, CB], sums int32 [*out, CS]."""
    return v.kernel(name, lambda: _Quantize(spec).emit())


class _Quantize:
    """Emits the kernel of one specification."""

    def __init__(self, spec: QuantizeSpec) -> None:
        self.spec = spec
        self.width = round_up(spec.channels, UNIT)
        self.blocks = spec.blocks
        self.split = spec.sums > spec.blocks
        # The last block also writes the padding.
        self.span = max(min(spec.block, self.width), self.width - (self.blocks - 1) * spec.block)

    def emit(self) -> None:
        """Arguments, launch, one item a group of lanes."""
        spec, dims = self.spec, v.DimVars()
        lead = tuple(dims(d) for d in spec.lead)
        x = v.argument("x", (*lead, spec.channels), "float32")
        out = lead if spec.padded is None else (lead[0], dims(spec.padded[0]), dims(spec.padded[1]))
        self.rows = v.product(out)
        shapes = (("codes", self.width, "int8"), ("scales", self.blocks, "float32"), ("sums", spec.sums, "int32"))
        given = [v.argument(name, (*out, columns), dtype) for name, columns, dtype in shapes]
        with v.root():
            self.x = t.view(x, (v.product(lead), spec.channels), "float32")
            self.codes, self.scales, self.sums = (
                t.view(buffer, (self.rows, columns), dtype)
                for buffer, (_, columns, dtype) in zip(given, shapes, strict=True)
            )
            lanes = min(t.WARP, 1 << (self.span - 1).bit_length())
            items = self.rows * self.blocks
            per_block = BLOCK_THREADS // lanes
            with t.launch((t.divide_round_up(items, per_block),), BLOCK_THREADS) as ((group,), thread):
                index = v.bind(group * per_block + thread // lanes)
                safe = v.bind(t.at_most(index, items - 1))
                row, block = v.bind(safe // self.blocks), v.bind(safe % self.blocks)
                source, inside = self._pixel(row, lead, out)
                self._item(_Item(row, block, index < v.i64(items), source, inside,
                                 v.bind(block * spec.block), v.bind(thread % lanes), lanes))  # fmt: skip
            if self.split:
                self._add_codes()

    def _add_codes(self) -> None:
        """A thread a sum; channels beyond the last are codes of 0."""
        spec = self.spec
        items = self.rows * spec.sums
        with t.launch((t.divide_round_up(items, BLOCK_THREADS),), BLOCK_THREADS) as ((group,), thread):
            index = v.bind(group * BLOCK_THREADS + thread)
            safe = v.bind(t.at_most(index, items - 1))
            row, which = v.bind(safe // spec.sums), v.bind(safe % spec.sums)
            total = t.local(1, "int32")
            v.put(total, tirx.const(0, "int32"), 1)

            def add(i: Expr) -> None:
                column = v.bind(which * spec.sum_channels + i)
                code = t.read_if(column < v.i64(self.width), self.codes[row, column], tirx.const(0, "int8"))
                v.put(total, total[0] + tirx.Cast("int32", code), 1)

            v.loop(spec.sum_channels, add)
            v.when(index < v.i64(items), lambda: v.store(self.sums, [row, which], total[0], 1))

    def _pixel(self, row: Expr, lead: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Expr, Expr]:
        """Row of x for a row of the result, and whether it lies inside the image."""
        if self.spec.padded is None:
            return row, tirx.const(True, "bool")
        top, left, _, _ = self.spec.pads
        line = v.bind(row // out[2])
        x, y = v.bind(row % out[2] - left), v.bind(line % out[1] - top)
        inside = v.bind(tirx.all(x >= v.i64(0), x < v.i64(lead[2]), y >= v.i64(0), y < v.i64(lead[1])))
        return v.bind(((line // out[1]) * lead[1] + y) * lead[2] + x), inside

    def _item(self, item: _Item) -> None:
        """Read, find the largest magnitude, write codes, sum and scale."""
        rounds = -(-self.span // item.lanes)
        held = [v.bind(self._read(item, v.i64(i))) for i in range(rounds)] if rounds <= HELD else None
        largest = t.local(1, "int32")
        total = t.local(1, "int32")
        for buffer in (largest, total):
            v.put(buffer, tirx.const(0, "int32"), 1)

        def measure(i: Expr, value: Expr) -> None:
            magnitude = tirx.op.reinterpret("int32", value) & tirx.const(0x7FFFFFFF, "int32")
            v.put(largest, tirx.max(largest[0], magnitude), 1)

        self._each(item, held, rounds, measure)
        bits = v.bind(t.max_lanes(v.bind(largest[0]), item.lanes, "int32"))
        amax = v.bind(tirx.max(tirx.op.reinterpret("float32", bits), tirx.const(SMALLEST, "float32")))
        level = tirx.const(LEVEL, "float32")
        inverse = v.bind(tirx.call_pure_extern("float32", "__fdiv_rn", level, amax))

        def encode(i: Expr, value: Expr) -> None:
            v.put(total, total[0] + self._encode(item, i, value, inverse), 1)

        self._each(item, held, rounds, encode)
        added = v.bind(t.sum_lanes(v.bind(total[0]), 1, item.lanes, "int32"))
        scale = tirx.call_pure_extern("float32", "__fdiv_rn", amax, level)

        def store() -> None:
            v.store(self.scales, [item.row, item.block], tirx.Select(item.inside, scale, tirx.const(0.0, "float32")), 1)
            if not self.split:
                v.store(self.sums, [item.row, item.block], added, 1)

        v.when(tirx.all(item.real, item.lane == v.i64(0)), store)

    def _each(self, item: _Item, held: list[Expr] | None, rounds: int, body: Any) -> None:
        if held is not None:
            for i, value in enumerate(held):
                body(v.i64(i), value)
            return
        v.loop(rounds, lambda i: body(i, v.bind(self._read(item, i))))

    def _within(self, item: _Item, i: Expr) -> Expr:
        """Channel within the block that a lane treats in round i."""
        return item.lane + i * item.lanes

    def _read(self, item: _Item, i: Expr) -> Expr:
        within = self._within(item, i)
        exists = [item.inside, within < v.i64(self.spec.block), item.start + within < v.i64(self.spec.channels)]
        return t.read_if(tirx.all(*exists), self.x[item.source, item.start + within], tirx.const(0.0, "float32"))

    def _encode(self, item: _Item, i: Expr, value: Expr, inverse: Expr) -> Expr:
        """Store one code; return it as int32."""
        scaled = tirx.call_pure_extern("float32", "__fmul_rn", value, inverse)
        rounded = v.bind(tirx.call_pure_extern("float32", "rintf", scaled))
        low, high = tirx.const(-LEVEL, "float32"), tirx.const(LEVEL, "float32")
        # A NaN compares false and becomes -127, as on CPUs.
        above = v.bind(tirx.Select(rounded > low, rounded, low))
        code = v.bind(tirx.Cast("int32", tirx.Select(above < high, above, high)))
        within = self._within(item, i)
        column = item.start + within
        last = item.block == v.i64(self.blocks - 1)
        mine = tirx.all(item.real, column < v.i64(self.width), tirx.any(within < v.i64(self.spec.block), last))
        v.when(mine, lambda: v.store(self.codes, [item.row, column], tirx.Cast("int8", code), 1))
        return code
