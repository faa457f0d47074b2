"""Packed k-bit weights to float32: rows of an embedding, or a whole weight for products with float activations.

A thread takes one step of one channel: four weights scale * (grid[code] - grid[zero_point]), a float product each;
or scale * code + offset, where the product is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.cuda.intrin.prmt import u32
from kbitc.targets.cuda.kernels import levels
from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.packed import WeightSpec, declare_weight

Expr = Any
Buffer = Any
BLOCK_THREADS = 256


@dataclass
class Packed:
    """The buffers of a packed weight; `words` are its codes as uint32 [Np/16 * T, Cp/32, k, 16]."""

    spec: WeightSpec
    codes: Buffer
    scales: Buffer
    zeros: Buffer | None
    offsets: Buffer | None
    words: Buffer = None

    def four(self, tile: Expr, tap: Expr, unit: Expr, step: Expr, lane: Expr) -> list[Expr]:
        """The four weights of one step of one channel, float32."""
        spec = self.spec

        def word(vector: Any) -> Expr:
            return self.words[tile * spec.taps + tap, unit, v.i64(vector), lane]

        fed = v.bind(levels.one_step(spec.data_type, UnitCodes(spec.data_type.bits, word), step))
        # A block never ends inside a step; padding beyond C uses the last block's scale.
        block = t.at_most((unit * UNIT + step * GROUP) // spec.block, spec.blocks - 1)
        where = (tile, tap, v.bind(block), lane) if spec.scale_per_block else (tile, v.i64(0), v.i64(0), lane)
        zero: Expr = tirx.const(levels.feed_of(spec.data_type).bias + spec.origin, "int32")
        if self.zeros is not None:
            zero = tirx.Cast("int32", self.zeros[where]) - tirx.const(levels.zero_shift(spec.data_type), "int32")
        scale, zero = v.bind(tirx.Cast("float32", self.scales[where])), v.bind(zero)
        values = [v.bind(tirx.Cast("float32", _signed_byte(fed, j) - zero) * scale) for j in range(GROUP)]
        if self.offsets is None:
            return values
        offset = v.bind(tirx.Cast("float32", self.offsets[where]))
        return [v.bind(value + offset) for value in values]


def _signed_byte(word: Expr, j: int) -> Expr:
    """Byte j of a uint32 as a signed int32."""
    up = word << u32(24 - 8 * j) if j < GROUP - 1 else word
    return tirx.shift_right(tirx.op.reinterpret("int32", up), tirx.const(24, "int32"))


def declare_packed(spec: WeightSpec) -> Packed:
    """Declare codes, scales, and zero points or offsets as the next arguments of the open function."""
    made = declare_weight(spec)
    return Packed(spec, made.packed, made.scales, made.zeros, made.offsets)


def view_words(packed: Packed) -> None:
    """Look at the codes as words; call it inside the body."""
    spec = packed.spec
    shape = (spec.output_tiles * spec.taps, spec.units, spec.data_type.bits, LANES)
    packed.words = t.view(packed.codes, shape, "uint32")


def make_dequantize(spec: WeightSpec, name: str) -> Any:
    """The PrimFunc: packed codes, scales, zero points (if any) -> f32 [T, C, N]."""

    def body() -> None:
        packed = declare_packed(spec)
        out = v.argument("out", (spec.taps, spec.channels, spec.outputs), "float32")
        with v.root():
            view_words(packed)
            total = spec.output_tiles * spec.taps * spec.units * STEPS * LANES
            with t.launch((-(-total // BLOCK_THREADS),), BLOCK_THREADS) as ((group,), thread):
                index = v.bind(group * BLOCK_THREADS + thread)
                v.when(index < v.i64(total) if total % BLOCK_THREADS else True, lambda: _write(packed, out, index))

    return v.kernel(name, body)


def _write(packed: Packed, out: Buffer, index: Expr) -> None:
    """Neighbouring threads write neighbouring channels n."""
    spec = packed.spec
    lane, step = v.bind(index % LANES), v.bind(index // LANES % STEPS)
    unit = v.bind(index // (LANES * STEPS) % spec.units)
    tap = v.bind(index // (LANES * STEPS * spec.units) % spec.taps)
    tile = v.bind(index // (LANES * STEPS * spec.units * spec.taps))
    n = v.bind(tile * LANES + lane)
    first = v.bind(unit * UNIT + step * GROUP)

    def write() -> None:
        for j, value in enumerate(packed.four(tile, tap, unit, step, lane)):
            _store_if(first + j < v.i64(spec.channels), out, [tap, first + j, n], value)

    v.when(n < v.i64(spec.outputs), write)


def make_embedding(spec: WeightSpec, lead: tuple[Any, ...], index_dtype: str, name: str) -> Any:
    """The PrimFunc: indices [*lead], packed codes, scales, zero points (if any) -> f32 [*lead, C].

    Negative indices count from N. Others out of range are not caught here: they read row 0 or N - 1.
    """

    def body() -> None:
        dims = v.DimVars()
        shape = tuple(dims(d) for d in lead)
        indices = v.argument("indices", shape, index_dtype)
        packed = declare_packed(spec)
        out = v.argument("out", (*shape, spec.channels), "float32")
        count = v.product(shape)
        with v.root():
            view_words(packed)
            flat, rows = t.view(indices, (count,), index_dtype), t.view(out, (count, spec.channels), "float32")
            steps = -(-spec.channels // GROUP)
            total = count * steps
            with t.launch((t.divide_round_up(total, BLOCK_THREADS),), BLOCK_THREADS) as ((group,), thread):
                index = v.bind(group * BLOCK_THREADS + thread)
                v.when(index < v.i64(total), lambda: _row_step(packed, flat, rows, index, steps))

    return v.kernel(name, body)


def _row_step(packed: Packed, indices: Buffer, out: Buffer, index: Expr, steps: int) -> None:
    spec = packed.spec
    row, step = v.bind(index // steps), v.bind(index % steps)
    given = v.bind(tirx.Cast("int64", indices[row]))
    positive = tirx.Select(given < v.i64(0), given + spec.outputs, given)
    n = v.bind(tirx.max(tirx.min(positive, v.i64(spec.outputs - 1)), v.i64(0)))
    values = packed.four(v.bind(n // LANES), v.i64(0), v.bind(step // STEPS), v.bind(step % STEPS), v.bind(n % LANES))
    for j, value in enumerate(values):
        inside = True if spec.channels % GROUP == 0 else step * GROUP + j < v.i64(spec.channels)
        _store_if(inside, out, [row, step * GROUP + j], value)


def _store_if(condition: Expr, buffer: Buffer, at: list[Expr], value: Expr) -> None:
    v.when(condition, lambda: v.store(buffer, at, value, 1))
