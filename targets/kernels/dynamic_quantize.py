"""kbitc::DynamicQuantize: float rows to int8 codes with one scale and one sum or more a block, at run time.

The float operations are those of the ONNX function, in float32 and one at a time, so that codes equal
onnxruntime's bit for bit (for finite activations):

    amax = max(max |x| over the block, 1e-30)       inv = 127 / amax       scale = amax / 127
    q = clip(round half to even(x * inv), -127, 127)

Rows are padded to Cp with zero codes. For a convolution the border of the image is written too: zero codes, zero
scales, zero sums, which contribute nothing to any product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES, UNIT, round_up
from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
Dim = Any
LEVEL = 127.0
SMALLEST = 1e-30
# Blocks of up to this many vectors of 16 are unrolled and read once.
UNROLLED_VECTORS = 4


@dataclass(frozen=True)
class QuantizeSpec:
    """What is quantized.

    Attributes:
        lead: leading dimensions of x [*lead, C]; with a border they are (B, H, W).
        channels: C.
        block: channels per scale; C for one scale a row.
        pads: (top, left, bottom, right) border of pixels, all 0 for a matrix.
        padded: (height, width) of the result when there is a border.
        sum_block: channels per sum: those of a block, or a multiple of 16 below it when there is one block a row.
    """

    lead: tuple[Dim, ...]
    channels: int
    block: int
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    padded: tuple[Dim, Dim] | None = None
    sum_block: int = 0

    @property
    def blocks(self) -> int:
        """CB, scales of a row."""
        return -(-self.channels // self.block)

    @property
    def sum_channels(self) -> int:
        """Channels of one sum."""
        return self.sum_block or self.block

    @property
    def sums(self) -> int:
        """CS, sums of a row."""
        return -(-self.channels // self.sum_channels)


@dataclass
class _Arguments:
    x: Buffer
    codes: Buffer
    scales: Buffer
    sums: Buffer


def make_dynamic_quantize(spec: QuantizeSpec, name: str) -> Any:
    """The PrimFunc: x f32 [*lead, C] -> codes int8 [*out, Cp], scales f32 [*out, CB], sums int32 [*out, CS].

    `out` is `lead`, or (B, padded height, padded width) when there is a border.
    """
    return v.kernel(name, lambda: _emit(spec))


def _emit(spec: QuantizeSpec) -> None:
    dims = v.DimVars()
    lead = tuple(dims(d) for d in spec.lead)
    width = round_up(spec.channels, UNIT)
    x = v.argument("x", (*lead, spec.channels), "float32")
    out = lead if spec.padded is None else (lead[0], dims(spec.padded[0]), dims(spec.padded[1]))
    rows = v.product(out)

    results = (("codes", width, "int8"), ("scales", spec.blocks, "float32"), ("sums", spec.sums, "int32"))
    given = [v.argument(name, (*out, columns), dtype) for name, columns, dtype in results]
    with v.root():
        args = _Arguments(
            v.view(x, (v.product(lead), spec.channels), "float32"),
            *(
                v.view(buffer, (rows, columns), dtype)
                for buffer, (_, columns, dtype) in zip(given, results, strict=True)
            ),
        )
        _rows(spec, args, lead, out)


def _rows(spec: QuantizeSpec, args: _Arguments, lead: tuple[Dim, ...], out: tuple[Dim, ...]) -> None:
    """Every row of the result, in parallel."""
    with builder.parallel(v.i64(0), v.i64(v.product(out))) as row:
        if spec.padded is None:
            _row(spec, args, row, row)
            return
        top, left, _, _ = spec.pads
        height, across = lead[1], lead[2]
        line = v.bind(row // out[2])
        px, py = v.bind(row % out[2] - left), v.bind(line % out[1] - top)
        # Held: with open sizes TVM's simplifier would walk the quotients once for every use of a code, for minutes.
        source = v.held_index(((line // out[1]) * height + py) * across + px)
        inside = tirx.all(px >= v.i64(0), px < v.i64(across), py >= v.i64(0), py < v.i64(height))
        v.when(inside, lambda: _row(spec, args, source, row), lambda: _border(spec, args, row))


def _border(spec: QuantizeSpec, args: _Arguments, row: Expr) -> None:
    """A pixel outside the image."""
    units = round_up(spec.channels, UNIT) // UNIT
    v.loop(units, lambda i: v.store(args.codes, [row, i * UNIT], v.full(0, "int8", UNIT), UNIT))
    v.loop(spec.blocks, lambda block: v.store(args.scales, [row, block], v.full(0.0, "float32", 1), 1))
    v.loop(spec.sums, lambda block: v.store(args.sums, [row, block], v.full(0, "int32", 1), 1))


def _row(spec: QuantizeSpec, args: _Arguments, source: Expr, row: Expr) -> None:
    """All blocks of one row, then the padding of its last unit."""
    whole, rest = divmod(spec.channels, spec.block)
    vectors = -(-min(spec.sum_channels, spec.channels) // LANES)

    def one(block: Expr, start: Expr, channels: int) -> None:
        counts = [min(LANES, channels - at) for at in range(0, channels, LANES)]
        # With several sums there is one block.
        _Block(args, source, row, start, counts).emit(block, block, vectors)

    v.loop(whole, lambda b: one(b, v.bind(b * spec.block), spec.block))
    if rest:
        one(v.i64(whole), v.i64(whole * spec.block), rest)
    end = round_up(spec.channels, LANES)
    if end < round_up(spec.channels, UNIT):
        v.store(args.codes, [row, end], v.full(0, "int8", LANES), LANES)


@dataclass
class _Block:
    """One block of one row. Reads past no end: the last vector is masked.

    Attributes:
        args: the buffers.
        source, row: row of x and of the result.
        start: the first channel.
        counts: channels of each vector of 16.
    """

    args: _Arguments
    source: Expr
    row: Expr
    start: Expr
    counts: list[int]

    def emit(self, block: Expr, first_sum: Expr, vectors: int) -> None:
        """The largest magnitude, then the codes and a sum for every `vectors` vectors; few vectors are read once."""
        held = None
        if len(self.counts) <= UNROLLED_VECTORS:
            held = [self._read(v.i64(i), count) for i, count in enumerate(self.counts)]
        inverse = _scale(self.args, self.row, block, self._peak() if held is None else _largest(held))

        def whole(group: Expr) -> None:
            self._sum(v.bind(first_sum + group), v.bind(group * vectors), [LANES] * vectors, inverse, None)

        if held is not None:
            for group, at in enumerate(range(0, len(held), vectors)):
                end = at + vectors
                self._sum(first_sum + group, v.i64(at), self.counts[at:end], inverse, held[at:end])
            return
        full = sum(count == LANES for count in self.counts) // vectors
        v.loop(full, whole)
        if rest := self.counts[full * vectors :]:
            self._sum(first_sum + full, v.i64(full * vectors), rest, inverse, None)

    def _read(self, i: Expr, count: int) -> Expr:
        return v.bind(v.load_first(self.args.x, [self.source, self.start + i * LANES], "float32", LANES, count))

    def _each(self, counts: list[int], body: Callable[[Expr, int], None]) -> None:
        """All vectors: a loop, and the masked last one."""
        rest = counts[-1] if counts[-1] < LANES else 0
        v.loop(len(counts) - bool(rest), lambda i: body(i, LANES))
        if rest:
            body(v.i64(len(counts) - 1), rest)

    def _peak(self) -> Expr:
        """Lane by lane the largest magnitude."""
        largest = v.register(LANES, "int32")
        v.put(largest, v.full(0, "int32", LANES), LANES)
        self._each(
            self.counts,
            lambda i, count: v.put(largest, _maximum(v.get(largest, LANES), _magnitude(self._read(i, count))), LANES),
        )
        return v.get(largest, LANES)

    def _sum(self, index: Expr, first: Expr, counts: list[int], inverse: Expr, held: list[Expr] | None) -> None:
        """Codes of some vectors, `first` the first, and their sum; `held` are their values where they were read."""

        def codes(i: Expr, x: Expr) -> Expr:
            return _codes(self.args, self.row, self.start + (first + i) * LANES, x, inverse)

        if held is not None or len(counts) <= UNROLLED_VECTORS:
            values = held or [self._read(v.bind(first + i), count) for i, count in enumerate(counts)]
            total = codes(v.i64(0), values[0])
            for i, x in enumerate(values[1:]):
                total = v.bind(total + codes(v.i64(i + 1), x))
        else:
            held_total = v.register(LANES, "int32")
            v.put(held_total, v.full(0, "int32", LANES), LANES)

            def add(i: Expr, count: int) -> None:
                found = codes(i, self._read(v.bind(first + i), count))
                v.put(held_total, v.get(held_total, LANES) + found, LANES)

            self._each(counts, add)
            total = v.get(held_total, LANES)
        added = tirx.op.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", total)
        v.store(self.args.sums, [self.row, index], added, 1)


def _magnitude(x: Expr) -> Expr:
    """|x| as ordered integers: the bits of a float without its sign."""
    return v.bind(v.reinterpret(x, "int32", LANES) & v.full(0x7FFFFFFF, "int32", LANES))


def _maximum(left: Expr, right: Expr) -> Expr:
    return v.bind(tirx.max(left, right))


def _largest(values: list[Expr]) -> Expr:
    """Lane by lane the largest magnitude."""
    found = _magnitude(values[0])
    for more in values[1:]:
        found = _maximum(found, _magnitude(more))
    return found


def _scale(args: _Arguments, row: Expr, block: Expr, magnitudes: Expr) -> Expr:
    """Store the block's scale; return 127 / amax in every lane."""
    bits = tirx.op.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", magnitudes)
    amax = v.bind(tirx.max(v.reinterpret(v.bind(bits), "float32", 1), tirx.const(SMALLEST, "float32")))
    v.store(args.scales, [row, block], amax / tirx.const(LEVEL, "float32"), 1)
    return v.bind(v.splat(v.bind(tirx.const(LEVEL, "float32") / amax), LANES))


def _codes(args: _Arguments, row: Expr, start: Expr, x: Expr, inverse: Expr) -> Expr:
    """Store 16 codes; return them as int32."""
    rounded = v.bind(tirx.op.nearbyint(v.bind(x * inverse)))
    low, high = v.full(-LEVEL, "float32", LANES), v.full(LEVEL, "float32", LANES)
    # A NaN compares false and becomes -127, so that the conversion below is always defined.
    above = v.bind(tirx.Select(rounded > low, rounded, low))
    clipped = v.bind(tirx.Select(above < high, above, high))
    codes = v.bind(v.cast(clipped, "int32", LANES))
    v.store(args.codes, [row, start], v.cast(codes, "int8", LANES), LANES)
    return codes
