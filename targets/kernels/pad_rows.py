"""An image with a border of zeros: f32 [B, H, W, C] -> [B, H + top + bottom, W + left + right, C]."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
Dim = Any


def make_pad_rows(
    lead: tuple[Dim, Dim, Dim],
    padded: tuple[Dim, Dim],
    channels: int,
    pads: tuple[int, int, int, int],
    name: str,
) -> Any:
    """The PrimFunc: x f32 [B, H, W, C], out f32 [B, padded height, padded width, C].

    Args:
        lead: (B, H, W).
        padded: height and width with the border.
        channels: C.
        pads: (top, left, bottom, right) in pixels.
        name: of the kernel.
    """
    return v.kernel(name, lambda: _emit(lead, padded, channels, pads))


def _emit(lead: tuple[Dim, Dim, Dim], padded: tuple[Dim, Dim], channels: int, pads: tuple[int, int, int, int]) -> None:
    """A task a line. The pixels of a line lie side by side, so that it is zeros, one copy, zeros."""
    dims = v.DimVars()
    batch, height, width = (dims(d) for d in lead)
    out_height, out_width = (dims(d) for d in padded)
    x = v.argument("x", (batch, height, width, channels), "float32")
    out = v.argument("out", (batch, out_height, out_width, channels), "float32")
    top, left, _, _ = pads
    with v.root():
        source = v.view(x, (v.product((batch, height, width, channels)),), "float32")
        target = v.view(out, (v.product((batch, out_height, out_width, channels)),), "float32")
        with builder.parallel(v.i64(0), v.i64(batch * out_height)) as line:
            image, row = v.bind(tirx.truncdiv(line, v.i64(out_height))), v.bind(tirx.truncmod(line, v.i64(out_height)))
            y = v.bind(row - top)
            to = v.bind(line * (out_width * channels))
            start = v.bind((image * height + y) * (width * channels))

            def inside() -> None:
                after = (left + width) * channels
                _fill(target, to, left * channels, None, v.i64(0))
                _fill(target, v.bind(to + left * channels), width * channels, source, start)
                _fill(target, v.bind(to + after), out_width * channels - after, None, v.i64(0))

            v.when(
                tirx.all(y >= v.i64(0), y < v.i64(height)),
                inside,
                lambda: _fill(target, to, out_width * channels, None, v.i64(0)),
            )


def _fill(target: Buffer, to: Expr, count: Dim, source: Buffer | None, start: Expr) -> None:
    """Copy `count` elements from source[start], or zeros without a source, to target[to]."""
    vectors = count // LANES if isinstance(count, int) else v.bind(tirx.truncdiv(count, v.i64(LANES)))

    def move(at: Expr, lanes: int) -> None:
        value = v.full(0.0, "float32", lanes) if source is None else v.load(source, [start + at], lanes)
        v.store(target, [to + at], value, lanes)

    v.loop(vectors, lambda i: move(v.bind(i * LANES), LANES))
    v.loop(count - vectors * LANES, lambda i: move(v.bind(vectors * LANES + i), 1))
