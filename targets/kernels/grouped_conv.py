"""Grouped and depthwise convolution with packed k-bit weights and float activations, channels last.

    out[pixel, n] = sum over taps t, then channels c, in order, of x[pixel(t), group(n) * C + c] * w[n, t, c]

with w as in `wgemm`. Sixteen output channels are a vector: their T * C weights are dequantized once for a line of
output pixels. Depthwise (C = 1, one output a group) reads its channels as a vector; other groupings gather them.
Taps outside the image are skipped; whole windows, the usual case, are not tested tap by tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, UNIT
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa
from kbitc.targets.kernels.packed import WeightSpec, declare_bias, declare_weight
from kbitc.targets.kernels.tasks import clamp, store_channels
from kbitc.targets.kernels.wgemm import Decoder
from kbitc.targets.lower.contraction import ConvAttributes, PostFunction

Expr = Any
Buffer = Any
Dim = Any
# Weights of one output channel that are held unpacked; more would not fit the first-level cache with their pixels.
MOST_WEIGHTS = 128


@dataclass(frozen=True)
class GroupedSpec:
    """A grouped convolution.

    Attributes:
        weight: the weight.
        image: (B, H, W) of the activation, without border.
        out: (height, width) of the output.
        attributes: geometry; more than one group.
        bias, post: as in `QgemmSpec`.
    """

    weight: WeightSpec
    image: tuple[Dim, Dim, Dim]
    out: tuple[Dim, Dim]
    attributes: ConvAttributes
    bias: bool = False
    post: PostFunction | None = None


def make_grouped_conv(spec: GroupedSpec, isa: Isa, name: str) -> Any:
    """The PrimFunc: x f32 [B, H, W, C * group], the arguments of the weight, out f32 [B, OH, OW, N]."""
    return v.kernel(name, lambda: _Generator(spec, isa).emit())


class _Generator:
    def __init__(self, spec: GroupedSpec, isa: Isa) -> None:
        self.spec = spec
        self.isa = isa

    def emit(self) -> None:
        """Arguments, then one task a line of output pixels and 16 output channels."""
        spec, weight, dims = self.spec, self.spec.weight, v.DimVars()
        self.batch, self.height, self.width = (dims(d) for d in spec.image)
        self.out_height, self.out_width = (dims(d) for d in spec.out)
        in_channels = weight.channels * spec.attributes.group
        self.x = v.argument("x", (self.batch, self.height, self.width, in_channels), "float32")
        args = declare_weight(weight)
        self.bias = declare_bias(weight, spec.bias)
        self.out = v.argument("out", (self.batch, self.out_height, self.out_width, weight.outputs), "float32")
        self.decoder = Decoder(weight, self.isa, args)
        tiles = weight.output_tiles
        with v.root(), builder.parallel(v.i64(0), v.i64(self.batch * self.out_height * tiles)) as task:
            tile = v.bind(tirx.truncmod(task, v.i64(tiles)))
            line = v.bind(tirx.truncdiv(task, v.i64(tiles)))
            image = v.bind(tirx.truncdiv(line, v.i64(self.out_height)))
            y = v.bind(tirx.truncmod(line, v.i64(self.out_height)))
            self._line(tile, image, y)

    def _line(self, tile: Expr, image: Expr, y: Expr) -> None:
        """All pixels of a line."""
        weights = self._weights(tile)
        (kernel_y, kernel_x), (stride_y, stride_x) = self.spec.attributes.kernel, self.spec.attributes.strides
        (step_y, step_x), (top, left, _, _) = self.spec.attributes.dilations, self.spec.attributes.pads
        first_y = v.bind(y * stride_y - top)
        rows_inside = tirx.all(first_y >= v.i64(0), first_y + (kernel_y - 1) * step_y < v.i64(self.height))

        def pixel(column: Expr) -> None:
            first_x = v.bind(column * stride_x - left)
            inside = tirx.all(rows_inside, first_x >= v.i64(0), first_x + (kernel_x - 1) * step_x < v.i64(self.width))
            sums = [v.register(self.isa.lanes, "float32") for _ in range(self.isa.parts)]
            for held in sums:
                v.put(held, v.full(0.0, "float32", self.isa.lanes), self.isa.lanes)
            v.when(
                inside,
                lambda: self._window(tile, (image, first_y, first_x), weights, sums, inside=True),
                lambda: self._window(tile, (image, first_y, first_x), weights, sums, inside=False),
            )
            self._finish(tile, [image, y, column], sums)

        v.loop(self.out_width, pixel)

    def _weights(self, tile: Expr) -> dict[tuple[int, int, int], Buffer]:
        """The float32 weights of 16 output channels by (tap, channel, part), on the stack."""
        weight, lanes = self.spec.weight, self.isa.lanes
        self.decoder.prepare()
        held = {}
        for tap in range(weight.taps):
            for part in range(self.isa.parts):
                for start in range(0, weight.channels, GROUP):
                    unit, step = v.i64(start // UNIT), start % UNIT // GROUP
                    block = v.i64(start // weight.block)
                    factors = self.decoder.factors(tile, v.i64(tap), block, part)
                    fed = self.decoder.fed(self.decoder.codes(tile, v.i64(tap), unit, part), step)
                    for c in range(start, min(start + GROUP, weight.channels)):
                        held[tap, c, part] = v.register(lanes, "float32")
                        v.put(held[tap, c, part], self.decoder.weight(fed, c - start, factors), lanes)
        return held

    def _window(
        self,
        tile: Expr,
        corner: tuple[Expr, Expr, Expr],
        weights: dict[tuple[int, int, int], Buffer],
        sums: list[Buffer],
        *,
        inside: bool,
    ) -> None:
        """Add all taps; where the window is not inside the image each tap is tested."""
        image, first_y, first_x = corner
        attributes, weight = self.spec.attributes, self.spec.weight
        for tap in range(weight.taps):
            down, across = divmod(tap, attributes.kernel[1])
            py = v.bind(first_y + down * attributes.dilations[0])
            px = v.bind(first_x + across * attributes.dilations[1])

            def add(tap: int = tap, py: Expr = py, px: Expr = px) -> None:
                for c in range(weight.channels):
                    for part, held in enumerate(sums):
                        lanes = self.isa.lanes
                        x = self._activation([image, py, px], tile, c, part)
                        product = x * v.get(weights[tap, c, part], lanes)
                        v.put(held, v.get(held, lanes) + product, lanes)

            within = tirx.all(py >= v.i64(0), py < v.i64(self.height), px >= v.i64(0), px < v.i64(self.width))
            v.when(True if inside else within, add)

    def _activation(self, pixel: list[Expr], tile: Expr, c: int, part: int) -> Expr:
        """The activation that each of a vector of output channels reads; no channel beyond N is read."""
        weight, lanes = self.spec.weight, self.isa.lanes
        per_group = weight.outputs // self.spec.attributes.group
        start = tile * LANES + part * lanes
        real = min(lanes, max(0, weight.outputs - (weight.output_tiles - 1) * LANES - part * lanes))
        if per_group == 1 and weight.channels == 1 and weight.outputs % LANES == 0:
            return v.bind(v.load(self.x, [*pixel, start], lanes))
        last = v.full(weight.outputs - 1, "int64", lanes)
        lane = v.ramp(start, lanes)
        lane = lane if real == lanes else tirx.min(lane, last)
        channel = tirx.truncdiv(lane, v.full(per_group, "int64", lanes)) * v.full(weight.channels, "int64", lanes)
        return v.bind(self.x[(*pixel, channel + v.full(c, "int64", lanes))])

    def _finish(self, tile: Expr, pixel: list[Expr], sums: list[Buffer]) -> None:
        """Bias, clamp, store."""
        weight, lanes = self.spec.weight, self.isa.lanes
        for part, held in enumerate(sums):
            value = v.get(held, lanes)
            if self.bias is not None:
                value = value + v.load(self.bias, [tile * LANES + part * lanes], lanes)
            value = v.bind(clamp(v.bind(value), self.spec.post, lanes))
            store_channels(self.out, pixel, tile, part, value, weight.outputs, lanes)
