"""An image with a border: [B, H, W, C] -> [B, padded height, padded width, C], or the same as one line of elements.

Behind a line may lie elements that kernels read but never count; nobody writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
Dim = Any
# Elements that are moved at once, widest first: 64 bytes, then 16 elements.
WIDTHS = {"uint8": (64, 16, 1), "float32": (16, 1)}


@dataclass(frozen=True)
class BorderSpec:
    """What a kernel computes.

    Attributes:
        lead: (B, H, W).
        channels: C.
        pads: (top, left, bottom, right) in pixels.
        dtype: "uint8" or "float32".
        fill: what the border holds: the code of real zero, or zero.
        slack: out is a line with so many elements behind it; None: out is an image.
    """

    lead: tuple[Dim, Dim, Dim]
    channels: int
    pads: tuple[int, int, int, int]
    dtype: str
    fill: int | float
    slack: int | None = None


def make_border(spec: BorderSpec, name: str) -> Any:
    """The PrimFunc: x [B, H, W, C], out [B, padded height, padded width, C] or [their product + slack]."""
    return v.kernel(name, lambda: _emit(spec))


def _emit(spec: BorderSpec) -> None:
    """A task a row. The pixels of a row lie side by side, so that it is border, one copy, border."""
    dims, channels = v.DimVars(), spec.channels
    batch, height, width = (dims(d) for d in spec.lead)
    top, left, bottom, right = spec.pads
    # Sums of the variables of x: one of its own could not be told from the length of a line.
    out_height, out_width = top + height + bottom, left + width + right
    shape = (batch, out_height, out_width, channels)
    x = v.argument("x", (batch, height, width, channels), spec.dtype)
    out = v.argument("out", shape if spec.slack is None else (v.product(shape) + spec.slack,), spec.dtype)
    with v.root():
        source = v.view(x, (v.product((batch, height, width, channels)),), spec.dtype)
        target = v.view(out, (v.product(shape),), spec.dtype) if spec.slack is None else out
        move = partial(_move, spec, target)
        with builder.parallel(v.i64(0), v.i64(batch * out_height)) as line:
            image, row = v.bind(tirx.truncdiv(line, v.i64(out_height))), v.bind(tirx.truncmod(line, v.i64(out_height)))
            y = v.bind(row - top)
            to = v.bind(line * (out_width * channels))

            def inside() -> None:
                start = v.bind((image * height + y) * (width * channels))
                after = (left + width) * channels
                move(to, left * channels)
                move(v.bind(to + left * channels), width * channels, source, start)
                move(v.bind(to + after), out_width * channels - after)

            v.when(tirx.all(y >= v.i64(0), y < v.i64(height)), inside, lambda: move(to, out_width * channels))


def _move(
    spec: BorderSpec, target: Buffer, to: Expr, count: Dim, source: Buffer | None = None, start: Expr = 0
) -> None:
    """Copy `count` elements from source[start], or what the border holds without a source, to target[to]."""

    def some(at: Expr, lanes: int) -> None:
        value = v.full(spec.fill, spec.dtype, lanes) if source is None else v.load(source, [start + at], lanes)
        v.store(target, [to + at], value, lanes)

    done: Dim = 0
    for lanes in WIDTHS[spec.dtype]:
        rest = count - done
        vectors = rest // lanes if isinstance(rest, int) else v.bind(tirx.truncdiv(rest, v.i64(lanes)))
        v.loop(vectors, partial(_piece, some, done, lanes))
        done = done + vectors * lanes


def _piece(some: Callable[[Expr, int], None], first: Dim, lanes: int, index: Expr) -> None:
    """Vector `index` of a run that starts at element `first`."""
    some(v.bind(first + index * lanes), lanes)
