"""Depthwise convolution of integer graphs, channels last: every channel of codes by its own window of levels.

    acc[b, y, x, n] = bias[n] + sum over taps t of fed(x[b, y(t), x(t), n]) * level[t, n]       int32

then the requantization. A register of bytes holds neighbouring channels. The bytes of four taps are interleaved,
inside each 128 bits, into four registers of 32-bit lanes that hold the four taps of one channel each, which one
four-way dot product adds to four registers of sums. So the sums of register q, lane l belong to channel
16 * (l // 4) + 4 * q + l % 4: the numbers of the channels are stored in that order (`places`), and putting the four
bytes of a lane back in order is one shuffle.
Where registers cover the channels exactly, the image is read as it lies: pixels whose window lies inside go by two,
the others test every tap and take the zero point outside. Otherwise the image is given with its border, in one line,
and with some bytes behind it that may be read but never count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.byte_dot import ByteDot, narrower
from kbitc.targets.kernels.requantize import Epilogue, arguments, packed_codes, prepare, store_first
from kbitc.targets.kernels.rows import padded_size, unknown_size
from kbitc.targets.lower.contraction import ConvAttributes

Expr = Any
Buffer = Any
Dim = Any
Bytes = npt.NDArray[np.uint8]
# Bytes behind the image that a kernel may read.
SLACK = 64
PIXELS = 2
QUARTER = 16
# Windows of more taps are left to the matrix kernel.
MOST_TAPS = 64


@dataclass(frozen=True)
class IdepthwiseSpec:
    """What a kernel computes.

    Attributes:
        image: (B, H, W) of the activation as it lies.
        out: (height, width) of the output.
        channels: N = number of groups.
        attributes: geometry; its pads are those that the image does not hold.
        zero: the code that a pad counts as.
        flat: the image is one line of bytes and SLACK more.
        epilogue: how accumulators become uint8; None leaves them int32.
        accumulators: also write the accumulators when there is an epilogue.
        border: (top, left, bottom, right), the pixels that the image holds beside its own.
    """

    image: tuple[Dim, Dim, Dim]
    out: tuple[Dim, Dim]
    channels: int
    attributes: ConvAttributes
    zero: int = 0
    flat: bool = False
    epilogue: Epilogue | None = None
    accumulators: bool = False
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def taps(self) -> int:
        """T."""
        return self.attributes.kernel[0] * self.attributes.kernel[1]

    @property
    def fours(self) -> int:
        """Groups of four taps."""
        return -(-self.taps // GROUP)


@dataclass(frozen=True)
class Strip:
    """Channels that one register of bytes holds, `repeat` times one behind the other.

    Attributes:
        first: first channel.
        dot: the instruction on registers of that size.
        count: real channels of the register.
        repeat: how many such registers follow each other.
        place: place of the first channel in the arrays of the kernel.
    """

    first: int
    dot: ByteDot
    count: int
    repeat: int
    place: int


def strips(channels: int, dot: ByteDot) -> list[Strip]:
    """Whole registers, then one, as small as can be, with the channels that are left."""
    whole, rest = divmod(channels, dot.bytes)
    found = [Strip(0, dot, dot.bytes, whole, 0)] if whole else []
    if rest:
        found.append(Strip(whole * dot.bytes, narrower(dot, rest), rest, 1, whole * dot.bytes))
    return found


def places(channels: int, dot: ByteDot) -> list[tuple[npt.NDArray[np.int64], ByteDot]]:
    """The channel at each place, register after register of sums (-1 is padding), by strip with its registers."""
    found = []
    for strip in strips(channels, dot):
        lanes = np.arange(strip.dot.lanes)
        one = np.concatenate([QUARTER * (lanes // 4) + 4 * q + lanes % 4 for q in range(GROUP)])
        one = np.where(one < strip.count, one, -1)
        firsts = strip.first + strip.dot.bytes * np.arange(strip.repeat)
        channel = np.where(one < 0, -1, one + firsts[:, None])
        found.append((np.asarray(channel.reshape(-1), np.int64), strip.dot))
    return found


def pack_taps(levels: npt.NDArray[np.int8], dot: ByteDot) -> Bytes:
    """Levels [N, T] -> bytes [places * taps rounded up to 4]: for each register of bytes, each four taps, each q."""
    channels, taps = levels.shape
    fours = -(-taps // GROUP)
    padded = np.zeros((channels + 1, fours * GROUP), np.int8)  # the last row is padding, which place -1 reads
    padded[:channels, :taps] = levels
    parts = []
    for at, own in places(channels, dot):
        found = padded[at].reshape(-1, GROUP, own.lanes, fours, GROUP)
        parts.append(found.transpose(0, 3, 1, 2, 4).reshape(-1))
    return np.concatenate(parts).view(np.uint8)


def exact(channels: int, dot: ByteDot) -> bool:
    """Whether registers cover the channels exactly."""
    return all(strip.count == strip.dot.bytes for strip in strips(channels, dot))


def make_idepthwise(spec: IdepthwiseSpec, dot: ByteDot, name: str) -> Any:
    """The PrimFunc.

    Arguments: x u8 [B, H, W, N] or [B * H * W * N + SLACK], packed u8 (`pack_taps`), bias int32 [places],
    multiplier, shift, addend (if any), out u8 or int32 [B, OH, OW, N], accumulators int32 of that shape (if asked for).
    """
    return v.kernel(name, lambda: _Generator(spec, dot).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: IdepthwiseSpec, dot: ByteDot) -> None:
        self.spec = spec
        self.strips = strips(spec.channels, dot)
        self.places = sum(run.size for run, _ in places(spec.channels, dot))

    def emit(self) -> None:
        """Arguments, then a task a line of output pixels."""
        spec, dims = self.spec, v.DimVars()
        batch, self.height, self.width = (dims(d) for d in spec.image)
        image = None
        if spec.flat and unknown_size(spec.image):
            image, (self.height, self.width) = padded_size(spec.border)
        out_height, self.out_width = (dims(d) for d in spec.out)
        size = v.product((batch, self.height, self.width, spec.channels)) + (SLACK if spec.flat else 0)
        lying = (size,) if spec.flat else (batch, self.height, self.width, spec.channels)
        x = v.argument("x", lying, "uint8")
        self.packed = v.argument("packed", (self.places * spec.fours * GROUP,), "uint8")
        self.bias = v.argument("bias", (self.places,), "int32")
        self.numbers = arguments(spec.epilogue, self.places)
        if image is not None:
            v.argument("image", (batch, *image, spec.channels), "uint8")
        kinds = ["int32" if spec.epilogue is None else "uint8", *(["int32"] if spec.accumulators else [])]
        shape = (batch, out_height, self.out_width, spec.channels)
        outs = [v.argument(f"out{i}", shape, kind) for i, kind in enumerate(kinds)]
        with v.root():
            self.x = v.view(x, (size,), "uint8")
            self.outs = [(v.view(o, (v.product(shape),), kind), kind) for o, kind in zip(outs, kinds, strict=True)]
            with builder.parallel(v.i64(0), v.i64(batch * out_height)) as line:
                image, y = (
                    v.bind(tirx.truncdiv(line, v.i64(out_height))),
                    v.bind(tirx.truncmod(line, v.i64(out_height))),
                )
                self.top = v.bind(y * spec.attributes.strides[0] - spec.attributes.pads[0])
                self.line = v.held_index((image * self.height + self.top) * self.width * spec.channels)
                self.to = v.held_index(line * self.out_width * spec.channels)
                for strip in self.strips:
                    v.loop(strip.repeat, partial(self._pixels, strip))

    def _pixels(self, strip: Strip, index: Expr) -> None:
        """The channels of register `index` of a strip, in a line of pixels, some pixels at a time."""
        more = v.bind(index * strip.dot.bytes)
        start, inner = self._inner()
        tiles = inner // PIXELS if isinstance(inner, int) else v.bind(tirx.truncdiv(inner, v.i64(PIXELS)))
        v.loop(tiles, lambda i: self._tile(strip, more, v.bind(start + i * PIXELS), PIXELS, inside=True))
        done = tiles * PIXELS

        def single(i: Expr) -> None:
            pixel = v.bind(tirx.Select(i < v.i64(start), i, i + done))
            self._tile(strip, more, pixel, 1, inside=not any(self.spec.attributes.pads))

        v.loop(self.out_width - done, single)

    def _inner(self) -> tuple[int, Expr]:
        """First output pixel whose window is inside the image, and how many there are; 0 at the upper and lower rim."""
        conv = self.spec.attributes
        if not any(conv.pads):
            return 0, self.out_width
        (down, across), (step_y, step_x), (_, stride) = conv.kernel, conv.dilations, conv.strides
        first = -(-conv.pads[1] // stride)
        room = v.i64(self.width + (conv.pads[1] - (across - 1) * step_x - 1))
        end = tirx.Select(room >= v.i64(0), tirx.truncdiv(room, v.i64(stride)) + 1, v.i64(0))
        end = tirx.min(end, v.i64(self.out_width))
        inside = tirx.all(self.top >= v.i64(0), self.top + (down - 1) * step_y < v.i64(self.height))
        return first, v.bind(tirx.Select(inside, tirx.max(end - first, v.i64(0)), v.i64(0)))

    def _tile(self, strip: Strip, more: Expr, pixel: Expr, count: int, *, inside: bool) -> None:
        """Some neighbouring output pixels."""
        spec, dot = self.spec, strip.dot
        place = v.bind(more + strip.place)
        stride = spec.attributes.strides[1]
        left = v.bind(pixel * stride - spec.attributes.pads[1])
        corner = v.bind(self.line + left * spec.channels + (more + strip.first))
        start = [v.bind(v.load(self.bias, [place + q * dot.lanes], dot.lanes)) for q in range(GROUP)]
        sums = [list(start) for _ in range(count)]
        pairs: dict[tuple[int, int], Expr] = {}
        for four in range(spec.fours):
            at = place * (spec.fours * GROUP) + four * GROUP * dot.bytes
            levels = [dot.levels(v.bind(v.load(self.packed, [at + q * dot.bytes], dot.bytes))) for q in range(GROUP)]
            for i in range(count):
                from_ = corner + i * stride * spec.channels
                for q, words in enumerate(self._four_taps(dot, from_, left, four, inside=inside)):
                    if dot.chain:
                        pairs[i, q] = dot.narrow(pairs.get((i, q)), dot.codes(words), levels[q])
                    else:
                        sums[i][q] = v.bind(dot.dot(sums[i][q], dot.codes(words), levels[q]))
            if dot.chain and ((four + 1) % dot.chain == 0 or four == spec.fours - 1):
                for (i, q), found in pairs.items():
                    sums[i][q] = v.bind(sums[i][q] + dot.widened(found))
                pairs.clear()
        self._finish(strip, place, pixel, more, sums)

    def _four_taps(self, dot: ByteDot, corner: Expr, left: Expr, four: int, *, inside: bool) -> list[Expr]:
        """Four registers of the bytes of four taps, one channel a lane."""
        spec = self.spec
        across, (down_step, across_step) = spec.attributes.kernel[1], spec.attributes.dilations
        loads = []
        for j in range(GROUP):
            tap = min(four * GROUP + j, spec.taps - 1)  # a missing tap meets levels of 0
            down, right = (tap // across) * down_step, (tap % across) * across_step
            at = corner + (down * self.width + right) * spec.channels
            loads.append(self._load(dot, at, self.top + down, left + right, inside=inside))
        low, high = ([_interleaved(a, b, half, 1, dot.bytes) for half in range(2)]
                     for a, b in (loads[:2], loads[2:]))  # fmt: skip
        joined = [_interleaved(low[q // 2], high[q // 2], q % 2, 2, dot.bytes) for q in range(GROUP)]
        return [v.reinterpret(bytes_, "int32", dot.lanes) for bytes_ in joined]

    def _load(self, dot: ByteDot, at: Expr, y: Expr, x: Expr, *, inside: bool) -> Expr:
        """The bytes of one tap; the zero point where the tap lies outside of the image."""
        if inside:
            return v.bind(v.load(self.x, [at], dot.bytes))
        held = v.register(dot.bytes, "uint8")
        v.put(held, v.full(self.spec.zero, "uint8", dot.bytes), dot.bytes)
        within = tirx.all(y >= v.i64(0), y < v.i64(self.height), x >= v.i64(0), x < v.i64(self.width))
        v.when(within, lambda: v.put(held, v.load(self.x, [at], dot.bytes), dot.bytes))
        return v.bind(v.get(held, dot.bytes))

    def _finish(self, strip: Strip, place: Expr, pixel: Expr, more: Expr, sums: list[list[Expr]]) -> None:
        spec, dot = self.spec, strip.dot
        way = spec.epilogue
        made = [
            None
            if way is None
            else prepare(way, dot, self.numbers, v.bind(place + q * dot.lanes), limited=not dot.packs)
            for q in range(GROUP)
        ]
        for i, own in enumerate(sums):
            to = v.bind(self.to + (pixel + i) * spec.channels + (more + strip.first))
            for out, kind in self.outs:
                if kind == "int32":
                    _store_sums(out, to, own, strip)
                    continue
                codes = [v.bind(make(acc)) for make, acc in zip(made, own, strict=True) if make is not None]
                if dot.packs and way is not None:
                    _store_bytes(out, to, packed_codes(way, dot, codes), strip)
                else:
                    _store_bytes(out, to, _joined(codes, dot), strip)


def _interleaved(a: Expr, b: Expr, half: int, size: int, width: int) -> Expr:
    """Pieces of `size` bytes of a and b in turn, from the lower or upper half of each 128 bits."""
    picks = []
    for start in range(0, width, QUARTER):
        for piece in range(QUARTER // 2 // size):
            first = start + half * (QUARTER // 2) + piece * size
            picks += [first + i for i in range(size)] + [width + first + i for i in range(size)]
    return v.bind(tirx.Shuffle([a, b], [tirx.const(pick, "int32") for pick in picks]))


def _joined(codes: list[Expr], dot: ByteDot) -> Expr:
    """Four registers of codes, one channel a lane -> bytes in the order of the channels."""
    word = codes[0]
    for q in range(1, GROUP):
        word = word | tirx.shift_left(codes[q], v.full(8 * q, "int32", dot.lanes))
    mixed = v.bind(v.reinterpret(word, "uint8", dot.bytes))
    picks = [start + 4 * slot + q for start in range(0, dot.bytes, QUARTER) for q in range(GROUP) for slot in range(4)]
    return v.bind(tirx.Shuffle([mixed], [tirx.const(pick, "int32") for pick in picks]))


def _store_bytes(out: Buffer, to: Expr, ordered: Expr, strip: Strip) -> None:
    """The bytes of the channels that exist."""
    dot = strip.dot
    if strip.count == dot.bytes:
        v.store(out, [to], ordered, dot.bytes)
    else:
        store_first(out, [], to, ordered, dot.bytes, strip.count)


def _store_sums(out: Buffer, to: Expr, sums: list[Expr], strip: Strip) -> None:
    """Four registers of sums -> int32 in the order of the channels, four at a time."""
    for q, values in enumerate(sums):
        for four in range(strip.dot.lanes // 4):
            first = QUARTER * four + 4 * q
            count = min(4, strip.count - first)
            if count <= 0:
                continue
            picks = [tirx.const(4 * four + i, "int32") for i in range(4)]
            piece = values if strip.dot.lanes == 4 else v.bind(tirx.Shuffle([values], picks))
            v.store_first(out, [to + first], piece, 4, count)
