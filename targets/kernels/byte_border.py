"""An image of codes with a border: u8 [B, H, W, C] -> one line of B * padded height * padded width * C bytes.

Behind the line may lie bytes that kernels read but never count; nobody writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
Dim = Any
WIDTHS = (64, 16)


def make_byte_border(
    lead: tuple[Dim, Dim, Dim],
    channels: int,
    pads: tuple[int, int, int, int],
    zero: int,
    slack: int,
    name: str,
) -> Any:
    """The PrimFunc: x u8 [B, H, W, C], out u8 [B * padded height * padded width * C + slack].

    Args:
        lead: (B, H, W).
        channels: C.
        pads: (top, left, bottom, right) in pixels.
        zero: the code of real zero, which the border holds.
        slack: bytes behind the line.
        name: of the kernel.
    """
    return v.kernel(name, lambda: _emit(lead, channels, pads, zero, slack))


def _emit(
    lead: tuple[Dim, Dim, Dim],
    channels: int,
    pads: tuple[int, int, int, int],
    zero: int,
    slack: int,
) -> None:
    """A task a line. The pixels of a line lie side by side, so that it is border, one copy, border."""
    dims = v.DimVars()
    batch, height, width = (dims(d) for d in lead)
    top, left, bottom, right = pads
    # Sums of the variables of x: one of its own could not be told from the length of a line.
    out_height, out_width = top + height + bottom, left + width + right
    x = v.argument("x", (batch, height, width, channels), "uint8")
    target = v.argument("out", (v.product((batch, out_height, out_width, channels)) + slack,), "uint8")
    with v.root():
        source = v.view(x, (v.product((batch, height, width, channels)),), "uint8")
        with builder.parallel(v.i64(0), v.i64(batch * out_height)) as line:
            image, row = v.bind(tirx.truncdiv(line, v.i64(out_height))), v.bind(tirx.truncmod(line, v.i64(out_height)))
            y = v.bind(row - top)
            to = v.bind(line * (out_width * channels))

            def inside() -> None:
                start = v.bind((image * height + y) * (width * channels))
                after = (left + width) * channels
                _move(target, to, left * channels, zero)
                _move(target, v.bind(to + left * channels), width * channels, zero, source, start)
                _move(target, v.bind(to + after), out_width * channels - after, zero)

            v.when(
                tirx.all(y >= v.i64(0), y < v.i64(height)),
                inside,
                lambda: _move(target, to, out_width * channels, zero),
            )


def _move(target: Buffer, to: Expr, count: Dim, zero: int, source: Buffer | None = None, start: Expr = 0) -> None:
    """Copy `count` bytes from source[start], or the code of zero without a source, to target[to]."""

    def some(at: Expr, lanes: int) -> None:
        value = v.full(zero, "uint8", lanes) if source is None else v.load(source, [start + at], lanes)
        v.store(target, [to + at], value, lanes)

    done: Dim = 0
    for lanes in (*WIDTHS, 1):
        rest = count - done
        vectors = rest // lanes if isinstance(rest, int) else v.bind(tirx.truncdiv(rest, v.i64(lanes)))
        v.loop(vectors, partial(_piece, some, done, lanes))
        done = done + vectors * lanes


def _piece(some: Callable[[Expr, int], None], first: Dim, lanes: int, index: Expr) -> None:
    """Vector `index` of a run that starts at byte `first`."""
    some(v.bind(first + index * lanes), lanes)
