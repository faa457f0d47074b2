"""What the generators of matrix products share: parallel tasks over register tiles, and the way out to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ahead import Ahead
from kbitc.targets.lower.contraction import PostFunction

Expr = Any
Buffer = Any
# Row tiles that one parallel task walks over one group of weight tiles.
TASK_ROW_TILES = 16


def clamp(value: Expr, post: PostFunction | None, lanes: int) -> Expr:
    """min(max(value, low), high); NaN stays NaN because every comparison with it is false."""
    if post is None:
        return value
    if post.low is not None:
        low = v.full(post.low, "float32", lanes)
        value = v.bind(tirx.Select(value < low, low, value))
    if post.high is not None:
        high = v.full(post.high, "float32", lanes)
        value = tirx.Select(value > high, high, value)
    return value


def store_channels(
    out: Buffer, outer: list[Expr], tile: Expr, part: int, value: Expr, outputs: int, lanes: int
) -> None:
    """Store part `part` of 16-channel tile `tile` into out [*outer, N]; only real channels of the last tile."""
    last = -(-outputs // LANES) - 1
    start = v.bind(tile * LANES + part * lanes)
    count = min(lanes, max(0, outputs - last * LANES - part * lanes))
    if count == lanes:
        v.store(out, [*outer, start], value, lanes)
        return

    def rest() -> None:
        if count:
            v.store_first(out, [*outer, start], value, lanes, count)

    v.when(tile < v.i64(last), lambda: v.store(out, [*outer, start], value, lanes), rest)


def row_tasks(
    rows: Expr,
    tile: tuple[int, int],
    few_tiles: int,
    output_tiles: int,
    body: Callable[[Expr, int, Expr, int], None],
    least: int = 0,
    ahead: Ahead | None = None,
) -> None:
    """Cover [rows, 16-channel tiles] with register tiles in parallel.

    Rows left over after the last whole row tile are done by a row tile that ends with the last row and repeats some
    rows; it belongs to the task of the rows it repeats, so that no two threads write a value.

    Args:
        rows: number of rows, an int or an expression.
        tile: rows and 16-channel tiles of a register tile.
        few_tiles: 16-channel tiles of a register tile of one row, used when there are fewer rows than `tile[0]`
            (known now: only when there is one row).
        output_tiles: 16-channel tiles in all.
        body: emits a register tile (first row, rows, first tile, tiles).
        least: rows that there are if there are any; spares the code for fewer than `tile[0]`, in which the
            number of rows would be known to be 0, and TVM stops at divisions by it.
        ahead: weights to fetch before they are read, where there are more row tiles than one.
    """
    if isinstance(rows, int):
        few = rows == 1
        _tasks(rows, 1 if few else min(rows, tile[0]), few_tiles if few else tile[1], output_tiles, body, ahead)
        return
    if least >= tile[0]:
        _tasks(rows, *tile, output_tiles, body, ahead)
        return
    v.when(
        rows < v.i64(tile[0]),
        lambda: _tasks(rows, 1, few_tiles, output_tiles, body),
        lambda: _tasks(rows, *tile, output_tiles, body, ahead),
    )


def _tasks(
    rows: Expr, tile_rows: int, channels: int, output_tiles: int, body: Callable[[Expr, int, Expr, int], None],
    ahead: Ahead | None = None,
) -> None:  # fmt: skip
    """Parallel tasks: a run of row tiles by a group of weight tiles. There are at least `tile_rows` rows.

    Weights that do not stay in the cache are read once: all rows of a group come before the next group.
    """
    groups = -(-output_tiles // channels)
    whole = rows // tile_rows if isinstance(rows, int) else tirx.truncdiv(rows, v.i64(tile_rows))
    run = min(whole, TASK_ROW_TILES) if isinstance(whole, int) else TASK_ROW_TILES
    runs = -(-whole // run) if isinstance(whole, int) else tirx.truncdiv(whole + (run - 1), v.i64(run))
    exact = tile_rows == 1 or (isinstance(rows, int) and rows % tile_rows == 0)
    far = ahead is not None and ahead.far and groups > 1 and not (isinstance(whole, int) and whole == 1)

    def row_tile(i: Expr, start: Expr, group: Expr) -> None:
        if ahead is not None and far:
            ahead.fetch(v.bind(start + i), whole, group, channels)
        if exact and isinstance(whole, int) and whole == run:
            _group(v.bind((start + i) * tile_rows), tile_rows, group, channels, output_tiles, body)
            return
        index = v.bind(start + i)
        ordinary = tirx.all(index < v.i64(whole), i < v.i64(run))
        extra = tirx.all(index == v.i64(whole), v.i64(whole * tile_rows) < v.i64(rows))
        first = tirx.Select(ordinary, index * tile_rows, v.i64(rows - tile_rows))
        v.when(
            ordinary if exact else tirx.any(ordinary, extra),
            lambda: _group(v.bind(first), tile_rows, group, channels, output_tiles, body),
        )

    with builder.parallel(v.i64(0), v.i64(runs * groups)) as task:
        inner = runs if far else groups
        outer, last = v.bind(tirx.truncdiv(task, v.i64(inner))), v.bind(tirx.truncmod(task, v.i64(inner)))
        group, start = (outer, v.bind(last * run)) if far else (last, v.bind(outer * run))
        v.loop(run if exact else run + 1, lambda i: row_tile(i, start, group))


def _group(
    row: Expr, rows: int, group: Expr, channels: int, output_tiles: int, body: Callable[[Expr, int, Expr, int], None]
) -> None:
    """The register tiles of one group of weight tiles; the last group may be smaller."""
    whole, remain = divmod(output_tiles, channels)
    first = v.bind(group * channels)
    if not remain or not whole:
        body(row, rows, first, remain or channels)
        return
    v.when(
        group < v.i64(whole),
        lambda: body(row, rows, first, channels),
        lambda: body(row, rows, first, remain),
    )
