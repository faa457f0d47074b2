"""Transposes, and what is computed on the way: results go along another axis than the memory that is read.

Values are computed in vectors along the axis that the reads follow, and turned round in registers: squares of lines
for a long last axis, a braid of two to four lines for a short one, such as the colours of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import may_be_vector, steps_by_one
from kbitc.targets.cpu.rules.stages import Stage, at, loads_of

Expr = Any
Var = Any
Statement = Any

# Side of a square that is turned round element by element: 16 lines of 64 bytes stay in the first cache on both sides.
TRANSPOSE_TILE = 16
# Lines that are braided.
MOST_LINES = 4
WORDS = ("float32", "int32", "uint32")
NARROW = ("int8", "uint8", "int16", "uint16")


def crossing_axis(stage: Stage) -> int | None:
    """The axis along which the stage reads memory one after the other, when that is not the last one."""
    if len(stage.axes) < 2 or may_be_vector(stage.value, stage.axes[-1].var):
        return None
    loads = loads_of(stage.value)
    for position, axis in enumerate(stage.axes[:-1]):
        if any(steps_by_one(load, axis.var) for load in loads) and nest.as_int(axis.extent) != 1:
            return position
    return None


def transposed(stage: Stage, crossing: int, registers: int) -> Statement:
    """The stage, by vectors along the axis `crossing` where it can be; `registers`: 32-bit lanes of the target."""
    dtype = str(stage.buffer.ty.dtype)
    vectors = dtype in WORDS + NARROW and may_be_vector(stage.value, stage.axes[crossing].var)
    last = nest.as_int(stage.axes[-1].extent)
    if vectors and crossing == len(stage.axes) - 2 and last is not None and 1 < last <= MOST_LINES:
        return _braided(stage, last)
    return _squares(stage, crossing, (registers if dtype in WORDS else nest.LANES) if vectors else 0)


def _squares(stage: Stage, crossing: int, lanes: int) -> Statement:
    """Squares of the last axis and the one that the reads follow, so that whole cache lines are used on both sides.

    lanes: side of a square in registers; 0 for element by element.
    """
    across_axis, last = stage.axes[crossing], stage.axes[-1]
    others = [axis.extent for position, axis in enumerate(stage.axes[:-1]) if position != crossing]
    side = lanes or TRANSPOSE_TILE
    tile = nest.i64(side)
    down = tirx.floordiv(across_axis.extent + (tile - 1), tile)
    right = tirx.floordiv(last.extent + (tile - 1), tile)

    def square(flat: Expr) -> Statement:
        *outer, row, column = nest.split_index(flat, [*others, down, right])
        outer = outer[: len(others)]

        def indices(i: Expr, j: Expr) -> list[Expr]:
            places = list(outer)
            places.insert(crossing, row * tile + i)
            return [*places, column * tile + j]

        def loops(height: Expr, width: Expr) -> Statement:
            return nest.loop(width, lambda j: nest.loop(height, lambda i: at(stage, indices(i, j))))

        rows = tirx.min(tile, across_axis.extent - row * tile)
        columns = tirx.min(tile, last.extent - column * tile)
        whole = _turned(stage, indices, side) if lanes else loops(tile, tile)
        return tirx.IfThenElse(tirx.And(rows == tile, columns == tile), whole, loops(rows, columns))

    count = nest.product([*others, down, right])
    return nest.parallel(count, nest.i64(side * side), square)


def _turned(stage: Stage, indices: Callable[[Expr, Expr], list[Expr]], side: int) -> Statement:
    """One square in registers. log2(side) rounds of interleaving line i with line i + side / 2 transpose it."""
    dtype = str(stage.buffer.ty.dtype)
    allocations: list[Statement] = []
    statements: list[Statement] = []

    def register() -> Var:
        buffer, allocation = nest.scratch(dtype, side, "line")
        allocations.append(allocation)
        return buffer

    def held(value: Expr) -> Expr:
        """The value through a register of its own: a chain of names would grow (see lets.py)."""
        buffer = register()
        statements.append(nest.store(buffer, [_ramp(0, side)], value))
        return nest.load(buffer, [_ramp(0, side)])

    def line(j: int) -> Expr:
        buffer = register()
        statements.append(_line(stage, buffer, 0, side, lambda lane: indices(lane, nest.i64(j))))
        return nest.load(buffer, [_ramp(0, side)])

    lines = [line(j) for j in range(side)]
    half = side // 2
    for _ in range(side.bit_length() - 1):
        pairs = [(lines[i], lines[i + half]) for i in range(half)]
        lines = [held(_interleaved(a, b, start, side)) for a, b in pairs for start in (0, half)]
    for i, value in enumerate(lines):
        *outer, first = indices(nest.i64(i), nest.i64(0))
        statements.append(nest.store(stage.buffer, [*outer, _ramp(first, side)], value))
    return nest.sequence([*allocations, *statements])


def _braided(stage: Stage, count: int) -> Statement:
    """The last axis has `count` elements: a vector of each, along the axis before it, braided and stored as one run."""
    *others, across_axis, _ = (axis.extent for axis in stage.axes)
    shape = [*others, across_axis * nest.i64(count)]
    flat = tirx.decl_buffer(shape, str(stage.buffer.ty.dtype), name=f"{stage.buffer.name}_joined")
    lanes, known = nest.LANES, nest.as_int(across_axis)

    def run(outer: list[Expr], start: Expr) -> Statement:
        buffer, allocation = nest.scratch(str(flat.ty.dtype), count * lanes, "lines")

        def line(j: int) -> Statement:
            return _line(stage, buffer, j * lanes, lanes, lambda lane: [*outer, start + lane, nest.i64(j)])

        values = [nest.load(buffer, [_ramp(j * lanes, lanes)]) for j in range(count)]
        picks = [tirx.const(lane + lanes * j, "int32") for lane in range(lanes) for j in range(count)]
        place = _ramp(start * nest.i64(count), count * lanes)
        return nest.sequence(
            [allocation, *map(line, range(count)), nest.store(flat, [*outer, place], tirx.Shuffle(values, picks))]
        )

    def row(index: Expr) -> Statement:
        outer = nest.split_index(index, others)
        runs = tirx.floordiv(across_axis + nest.i64(lanes - 1), nest.i64(lanes))
        whole = nest.loop(
            runs, lambda i: run(outer, tirx.min(i * nest.i64(lanes), across_axis - nest.i64(lanes))), name="run"
        )
        single = nest.loop(
            across_axis, lambda i: nest.loop(nest.i64(count), lambda j: at(stage, [*outer, i, j])), name="single"
        )
        if known is not None:
            return whole if known >= lanes else single
        return tirx.IfThenElse(across_axis >= nest.i64(lanes), whole, single)

    rows = nest.parallel(nest.product(others), across_axis * nest.i64(count), row)
    return nest.sequence([tirx.DeclBuffer(flat, data=stage.buffer.data), rows])


def _line(stage: Stage, buffer: Var, first: int, lanes: int, places: Callable[[Expr], list[Expr]]) -> Statement:
    """buffer[first + lane] = the value at places(lane), as a vector."""

    def element(lane: Expr) -> Statement:
        names = [(axis.var, place) for axis, place in zip(stage.axes, places(lane), strict=True)]
        return nest.store(buffer, [nest.i64(first) + lane], nest.replace(stage.value, names))

    return nest.vector(lanes, element)


def _ramp(start: Any, lanes: int) -> Expr:
    return tirx.Ramp(nest.i64(start), nest.i64(1), lanes)


def _interleaved(a: Expr, b: Expr, start: int, side: int) -> Expr:
    """a[start], b[start], a[start + 1], ...: one half of two lines."""
    picks = [start + i // 2 + side * (i % 2) for i in range(side)]
    return tirx.Shuffle([a, b], [tirx.const(pick, "int32") for pick in picks])
