"""Float32 depthwise convolution, channels last: every channel by its own window.

    out[b, y, x, n] = sum over taps t in order of x[b, y(t), x(t), n] * w[t, n]                    float32, fused

then bias and clamp. Vectors are channels. A task is one line of output pixels. The pixels whose window lies inside
the image go by several at a time, 16 channels after 16; the others, at the border, test every tap and skip those
outside, so that no border is written to memory.
The weight is packed to [tiles, T, 16].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ftile import Registers
from kbitc.targets.kernels.tasks import clamp
from kbitc.targets.lower.contraction import ConvAttributes, PostFunction

Expr = Any
Dim = Any
# Pixels that are summed together: they share the weights, and their sums hide the latency of a multiply-add.
PIXELS = 4
# Taps of a window that is written out; a larger one loops over its lines.
MOST_UNROLLED = 9


@dataclass(frozen=True)
class DepthwiseSpec:
    """What a kernel computes.

    Attributes:
        image: (B, H, W) of the activation, without border.
        out: (height, width) of the output.
        channels: N = number of groups.
        attributes: geometry.
        bias: a float32 [tiles * 16] is added.
        post: clamp after the bias.
    """

    image: tuple[Dim, Dim, Dim]
    out: tuple[Dim, Dim]
    channels: int
    attributes: ConvAttributes
    bias: bool = False
    post: PostFunction | None = None

    @property
    def taps(self) -> int:
        """T."""
        return self.attributes.kernel[0] * self.attributes.kernel[1]

    @property
    def tiles(self) -> int:
        """16-channel tiles."""
        return -(-self.channels // LANES)


def make_fdepthwise(spec: DepthwiseSpec, registers: Registers, name: str) -> Any:
    """The PrimFunc.

    Arguments: x f32 [B, H, W, N], packed f32 [tiles, T, 16], bias f32 [tiles * 16] (if any),
    out f32 [B, OH, OW, N].
    """
    return v.kernel(name, lambda: _Generator(spec, registers).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: DepthwiseSpec, registers: Registers) -> None:
        self.spec = spec
        self.lanes = registers.lanes
        self.parts = registers.parts

    def emit(self) -> None:
        """Arguments, then a task a line."""
        spec, dims = self.spec, v.DimVars()
        batch, self.height, self.width = (dims(d) for d in spec.image)
        out_height, self.out_width = (dims(d) for d in spec.out)
        self.x = v.argument("x", (batch, self.height, self.width, spec.channels), "float32")
        self.packed = v.argument("packed", (spec.tiles, spec.taps, LANES), "float32")
        self.bias = v.argument("bias", (spec.tiles * LANES,), "float32") if spec.bias else None
        self.out = v.argument("out", (batch, out_height, self.out_width, spec.channels), "float32")
        with v.root(), builder.parallel(v.i64(0), v.i64(batch * out_height)) as task:
            self.image = v.bind(tirx.truncdiv(task, v.i64(out_height)))
            self.y = v.bind(tirx.truncmod(task, v.i64(out_height)))
            self.top = v.bind(self.y * spec.attributes.strides[0] - spec.attributes.pads[0])
            self._line()

    def _line(self) -> None:
        """One line of output pixels: its inner pixels several at a time, the others one by one."""
        start, inner = self._inner()
        tiles = v.bind(tirx.truncdiv(inner, v.i64(PIXELS)))
        v.loop(tiles, lambda i: self._channels(v.bind(start + i * PIXELS), PIXELS, inside=True))
        done = v.bind(tiles * PIXELS)

        def single(i: Expr) -> None:
            pixel = v.bind(tirx.Select(i < start, i, i + done))
            self._channels(pixel, 1, inside=False)

        v.loop(v.bind(self.out_width - done), single)

    def _inner(self) -> tuple[Expr, Expr]:
        """First output pixel whose window is inside the image, and how many there are; 0 at the upper and lower rim."""
        (down, across), (_, stride) = self.spec.attributes.kernel, self.spec.attributes.strides
        step_y, step_x = self.spec.attributes.dilations
        left = self.spec.attributes.pads[1]
        first = -(-left // stride)
        room = self.width + (left - (across - 1) * step_x - 1)
        end = tirx.Select(v.i64(room) >= v.i64(0), tirx.truncdiv(v.i64(room), v.i64(stride)) + 1, v.i64(0))
        end = tirx.min(end, v.i64(self.out_width))
        rows_inside = tirx.all(self.top >= v.i64(0), self.top + (down - 1) * step_y < v.i64(self.height))
        count = tirx.Select(rows_inside, tirx.max(end - first, v.i64(0)), v.i64(0))
        return v.i64(first), v.bind(count)

    def _channels(self, pixel: Expr, pixels: int, *, inside: bool) -> None:
        """All channels of some neighbouring output pixels; the last tile reads and writes real channels only."""
        channels = self.spec.channels
        whole, rest = divmod(channels, LANES)
        v.loop(whole, lambda tile: self._tile(tile, LANES, pixel, pixels, inside=inside))
        if rest:
            self._tile(v.i64(whole), rest, pixel, pixels, inside=inside)

    def _tile(self, tile: Expr, real: int, pixel: Expr, pixels: int, *, inside: bool) -> None:
        """Sixteen channels, of which `real` exist, of some output pixels."""
        stride, left = self.spec.attributes.strides[1], self.spec.attributes.pads[1]
        corners = [v.bind((pixel + i) * stride - left) for i in range(pixels)]
        for part in range(self.parts):
            count = min(self.lanes, real - part * self.lanes)
            if count > 0:
                self._part(tile, part, count, pixel, corners, inside=inside)

    def _part(self, tile: Expr, part: int, count: int, pixel: Expr, corners: list[Expr], *, inside: bool) -> None:
        """One register of channels of some output pixels."""
        spec, lanes = self.spec, self.lanes
        start = v.bind(tile * LANES + part * lanes)
        sums = [v.register(lanes, "float32") for _ in corners]
        for held in sums:
            v.put(held, v.full(0.0, "float32", lanes), lanes)

        def tap(down: Expr, across: int) -> None:
            weight = v.bind(v.load(self.packed, [tile, down * spec.attributes.kernel[1] + across, part * lanes], lanes))
            y = self.top + down * spec.attributes.dilations[0]
            for held, corner in zip(sums, corners, strict=True):
                x = corner + across * spec.attributes.dilations[1]

                def add(held: Any = held, x: Expr = x) -> None:
                    loaded = v.load_first(self.x, [self.image, y, x, start], "float32", lanes, count)
                    v.put(held, v.get(held, lanes) + loaded * weight, lanes)

                v.when(inside or self._within(y, x), add)

        self._window(tap)
        for i, held in enumerate(sums):
            value = v.get(held, lanes)
            if self.bias is not None:
                value = value + v.load(self.bias, [start], lanes)
            value = v.bind(clamp(v.bind(value), spec.post, lanes))
            v.store_first(self.out, [self.image, self.y, pixel + i, start], value, lanes, count)

    def _window(self, tap: Callable[[Expr, int], None]) -> None:
        """All taps in order."""
        down, across = self.spec.attributes.kernel

        def line(y: Expr) -> None:
            for x in range(across):
                tap(y, x)

        if down * across > MOST_UNROLLED:
            v.loop(down, line)
            return
        for y in range(down):
            line(v.i64(y))

    def _within(self, y: Expr, x: Expr) -> Expr:
        return tirx.all(y >= v.i64(0), y < v.i64(self.height), x >= v.i64(0), x < v.i64(self.width))
