"""kbitc::DynamicQuantize: float rows to int8 codes with one scale and one sum a block, at run time.

The float operations are those of the ONNX function, in float32 and one at a time, so that codes equal
onnxruntime's bit for bit (for finite activations):

    amax = max(max |x| over the block, 1e-30)       inv = 127 / amax       scale = amax / 127
    q = clip(round half to even(x * inv), -127, 127)

Rows are padded to Cp with zero codes. For a convolution the border of the image is written too: zero codes, zero
scales, zero sums, which contribute nothing to any product.
"""

from __future__ import annotations

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
    """

    lead: tuple[Dim, ...]
    channels: int
    block: int
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    padded: tuple[Dim, Dim] | None = None


@dataclass
class _Arguments:
    x: Buffer
    codes: Buffer
    scales: Buffer
    sums: Buffer


def make_dynamic_quantize(spec: QuantizeSpec, name: str) -> Any:
    """The PrimFunc: x f32 [*lead, C] -> codes int8 [*out, Cp], scales f32 [*out, CB], sums int32 [*out, CB].

    `out` is `lead`, or (B, padded height, padded width) when there is a border.
    """
    return v.kernel(name, lambda: _emit(spec))


def _emit(spec: QuantizeSpec) -> None:
    dims = v.DimVars()
    lead = tuple(dims(d) for d in spec.lead)
    blocks, width = -(-spec.channels // spec.block), round_up(spec.channels, UNIT)
    x = v.argument("x", (*lead, spec.channels), "float32")
    out = lead if spec.padded is None else (lead[0], dims(spec.padded[0]), dims(spec.padded[1]))
    rows = v.product(out)

    results = (("codes", width, "int8"), ("scales", blocks, "float32"), ("sums", blocks, "int32"))
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
    blocks, width = -(-spec.channels // spec.block), round_up(spec.channels, UNIT)
    with builder.parallel(v.i64(0), v.i64(v.product(out))) as row:
        if spec.padded is None:
            _row(spec, args, row, row)
            return
        top, left, _, _ = spec.pads
        height, across = lead[1], lead[2]
        line = v.bind(row // out[2])
        px, py = v.bind(row % out[2] - left), v.bind(line % out[1] - top)
        source = v.bind(((line // out[1]) * height + py) * across + px)
        inside = tirx.all(px >= v.i64(0), px < v.i64(across), py >= v.i64(0), py < v.i64(height))
        v.when(inside, lambda: _row(spec, args, source, row), lambda: _border(args, row, width, blocks))


def _border(args: _Arguments, row: Expr, width: int, blocks: int) -> None:
    """A pixel outside the image."""
    v.loop(width // UNIT, lambda i: v.store(args.codes, [row, i * UNIT], v.full(0, "int8", UNIT), UNIT))

    def clear(block: Expr) -> None:
        v.store(args.scales, [row, block], v.full(0.0, "float32", 1), 1)
        v.store(args.sums, [row, block], v.full(0, "int32", 1), 1)

    v.loop(blocks, clear)


def _row(spec: QuantizeSpec, args: _Arguments, source: Expr, row: Expr) -> None:
    """All blocks of one row, then the padding of its last unit."""
    whole, rest = divmod(spec.channels, spec.block)
    v.loop(whole, lambda b: _block(args, source, row, b, v.bind(b * spec.block), spec.block))
    if rest:
        _block(args, source, row, v.i64(whole), v.i64(whole * spec.block), rest)
    end = round_up(spec.channels, LANES)
    if end < round_up(spec.channels, UNIT):
        v.store(args.codes, [row, end], v.full(0, "int8", LANES), LANES)


def _block(args: _Arguments, source: Expr, row: Expr, block: Expr, start: Expr, channels: int) -> None:
    """One block: the largest magnitude, then the codes and their sum. Reads past no end: the rest is masked."""
    vectors, rest = divmod(channels, LANES)
    counts = [LANES] * vectors + ([rest] if rest else [])
    if len(counts) <= UNROLLED_VECTORS:
        held = [
            v.bind(v.load_first(args.x, [source, start + LANES * i], "float32", LANES, count))
            for i, count in enumerate(counts)
        ]
        inverse = _scale(args, row, block, _largest([_magnitude(x) for x in held]))
        codes = [_codes(args, row, start + LANES * i, x, inverse) for i, x in enumerate(held)]
        total = codes[0]
        for more in codes[1:]:
            total = v.bind(total + more)
    else:
        total = _long_block(args, source, row, block, start, counts)
    added = tirx.op.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", total)
    v.store(args.sums, [row, block], added, 1)


def _long_block(args: _Arguments, source: Expr, row: Expr, block: Expr, start: Expr, counts: list[int]) -> Expr:
    """A block of many vectors, read twice."""
    rest = counts[-1] if counts[-1] < LANES else 0
    vectors = len(counts) - bool(rest)
    largest, total = v.register(LANES, "int32"), v.register(LANES, "int32")
    for buffer in (largest, total):
        v.put(buffer, v.full(0, "int32", LANES), LANES)

    def read(i: Expr, count: int) -> Expr:
        return v.bind(v.load_first(args.x, [source, start + i * LANES], "float32", LANES, count))

    def measure(i: Expr, count: int = LANES) -> None:
        v.put(largest, _maximum(v.get(largest, LANES), _magnitude(read(i, count))), LANES)

    v.loop(vectors, measure)
    if rest:
        measure(v.i64(vectors), rest)
    inverse = _scale(args, row, block, v.get(largest, LANES))

    def encode(i: Expr, count: int = LANES) -> None:
        codes = _codes(args, row, start + i * LANES, read(i, count), inverse)
        v.put(total, v.get(total, LANES) + codes, LANES)

    v.loop(vectors, encode)
    if rest:
        encode(v.i64(vectors), rest)
    return v.get(total, LANES)


def _magnitude(x: Expr) -> Expr:
    """|x| as ordered integers: the bits of a float without its sign."""
    return v.bind(v.reinterpret(x, "int32", LANES) & v.full(0x7FFFFFFF, "int32", LANES))


def _maximum(left: Expr, right: Expr) -> Expr:
    return v.bind(tirx.max(left, right))


def _largest(magnitudes: list[Expr]) -> Expr:
    found = magnitudes[0]
    for more in magnitudes[1:]:
        found = _maximum(found, more)
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
