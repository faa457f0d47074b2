"""Groups of one stage without reduction: maps, broadcasts, gathers, slices, pads, concatenations, transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import joined_suffix, may_be_vector, pieces, steps_by_one
from kbitc.targets.cpu.rules.stages import Axis, Stage, loads_of, read_group, same_buffer, uses
from kbitc.targets.target import Target

Expr = Any
Var = Any
Statement = Any
PrimFunc = Any

# Vectors of one parallel task when everything is one long axis.
TASK_VECTORS = 512
# Side of the square that a transpose works on: 16 lines of 64 bytes stay in the first cache on both sides.
TRANSPOSE_TILE = 16


def elementwise(function: PrimFunc, target: Target) -> PrimFunc | None:
    """One stage without reduction: vectors along the trailing axes that lie in memory one after the other."""
    group = read_group(function)
    if group is None or len(group.stages) != 1 or group.stages[0].reducer:
        return None
    stage = group.stages[0]
    if not stage.axes:
        return nest.finish(function, nest.store(stage.buffer, [], stage.value))
    crossing = _crossing_axis(stage)
    if crossing is not None:
        return nest.finish(function, _transposed(stage, crossing, target.lanes))
    views, joined = join_axes(stage)
    body = _rows(joined) if len(joined.axes) > 1 else _line(joined)
    return nest.finish(function, nest.sequence([*views, body]))


def join_axes(stage: Stage) -> tuple[list[Statement], Stage]:
    """The stage with its trailing axes joined as far as all memory allows, and the views that it then uses."""
    count = joined_suffix(stage.value, stage.axes)
    if count == 1:
        return [], stage
    suffix = stage.axes[len(stage.axes) - count :]
    joined = Axis(tirx.Var("joined", "int64"), nest.product([axis.extent for axis in suffix]))
    views: list[tuple[Var, Var]] = []

    def view(buffer: Var) -> Var:
        for known, made in views:
            if same_buffer(known, buffer):
                return made
        shape = [*buffer.ty.shape[: len(buffer.ty.shape) - count], joined.extent]
        made = tirx.decl_buffer(shape, str(buffer.ty.dtype), name=f"{buffer.name}_joined")
        views.append((buffer, made))
        return made

    def read(load: Any) -> Expr:
        if not any(uses(index, axis.var) for index in load.indices for axis in suffix):
            return load
        return nest.load(view(load.source), [*load.indices[: len(load.indices) - count], joined.var])

    value = tvm_ffi.structural_map(stage.value, [(ir.TensorLoad, read)], order="post")
    axes = (*stage.axes[: len(stage.axes) - count], joined)
    buffer = view(stage.buffer)
    declared = [tirx.DeclBuffer(made, data=buffer.data) for buffer, made in views]
    return declared, Stage(stage.name, buffer, axes, (), "", None, value)


def at(stage: Stage, indices: Sequence[Expr]) -> Statement:
    """The store of one element."""
    names = [(axis.var, index) for axis, index in zip(stage.axes, indices, strict=True)]
    return nest.store(stage.buffer, indices, nest.replace(stage.value, names))


def along(stage: Stage, outer: Sequence[Expr]) -> Statement:
    """All elements of the last axis at some outer indices."""
    last = stage.axes[-1]
    parts = pieces(stage.value, last)
    if parts is None:
        return _line_of(stage, outer, last.extent, nest.i64(0))
    return nest.sequence(
        [
            _line_of(replace(stage, value=value), outer, nest.i64(end - begin), nest.i64(begin))
            for begin, end, value in parts
        ]
    )


def _line_of(stage: Stage, outer: Sequence[Expr], extent: Expr, begin: Expr) -> Statement:
    """Elements begin .. begin + extent - 1 of the last axis."""
    if may_be_vector(stage.value, stage.axes[-1].var):
        return nest.across(extent, lambda i: at(stage, [*outer, begin + i]), repeatable=True)
    return nest.loop(extent, lambda i: at(stage, [*outer, begin + i]))


def _rows(stage: Stage) -> Statement:
    """Parallel over all axes but the last."""
    extents = [axis.extent for axis in stage.axes[:-1]]
    count = nest.product(extents)
    return nest.parallel(count, stage.axes[-1].extent, lambda row: along(stage, nest.split_index(row, extents)))


def _line(stage: Stage) -> Statement:
    """One long axis, in parallel runs of vectors."""
    extent = stage.axes[0].extent
    known = nest.as_int(extent)
    small = known is not None and known < nest.PARALLEL_WORK
    if small or not may_be_vector(stage.value, stage.axes[0].var):
        return along(stage, [])
    task = TASK_VECTORS * nest.LANES
    tasks = tirx.floordiv(extent, nest.i64(task))

    def run(index: Expr) -> Statement:
        start = index * nest.i64(task)
        return nest.across(nest.i64(task), lambda i: at(stage, [start + i]), repeatable=True)

    begin = tasks * nest.i64(task)
    rest = nest.across(extent - begin, lambda i: at(stage, [begin + i]), repeatable=False)
    return nest.sequence([nest.parallel(tasks, nest.i64(task), run), rest])


def _crossing_axis(stage: Stage) -> int | None:
    """The axis along which the stage reads memory one after the other, when that is not the last one."""
    if len(stage.axes) < 2 or may_be_vector(stage.value, stage.axes[-1].var):
        return None
    loads = loads_of(stage.value)
    for position, axis in enumerate(stage.axes[:-1]):
        if any(steps_by_one(load, axis.var) for load in loads) and nest.as_int(axis.extent) != 1:
            return position
    return None


def _transposed(stage: Stage, crossing: int, registers: int) -> Statement:
    """Squares of the last axis and the one that the reads follow, so that whole cache lines are used on both sides."""
    across_axis, last = stage.axes[crossing], stage.axes[-1]
    others = [axis.extent for position, axis in enumerate(stage.axes[:-1]) if position != crossing]
    shuffled = _is_copy_across(stage, across_axis)
    side = registers if shuffled else TRANSPOSE_TILE
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
        whole = _shuffled(stage, indices, side) if shuffled else loops(tile, tile)
        return tirx.IfThenElse(tirx.And(rows == tile, columns == tile), whole, loops(rows, columns))

    count = nest.product([*others, down, right])
    return nest.parallel(count, nest.i64(side * side), square)


def _is_copy_across(stage: Stage, axis: Axis) -> bool:
    """Whether the stage only copies words of 32 bits, in steps of one along the axis."""
    value = stage.value
    if not isinstance(value, ir.TensorLoad) or str(value.ty.dtype) not in ("float32", "int32", "uint32"):
        return False
    return steps_by_one(value, axis.var) and not may_be_vector(value, stage.axes[-1].var)


def _shuffled(stage: Stage, indices: Callable[[Expr, Expr], list[Expr]], side: int) -> Statement:
    """One square in registers. log2(side) rounds of interleaving line i with line i + side / 2 transpose it."""
    dtype = str(stage.value.ty.dtype)
    statements: list[Statement] = []

    allocations: list[Statement] = []

    def held(value: Expr) -> Expr:
        """The value through a register of its own: a chain of names would grow (see lets.py)."""
        buffer, allocation = nest.scratch(dtype, side, "line")
        allocations.append(allocation)
        statements.append(nest.store(buffer, [ramp(nest.i64(0))], value))
        return nest.load(buffer, [ramp(nest.i64(0))])

    def ramp(start: Expr) -> Expr:
        return tirx.Ramp(start, nest.i64(1), side)

    def line(j: int) -> Expr:
        places = indices(nest.i64(0), nest.i64(j))
        names = [(axis.var, place) for axis, place in zip(stage.axes, places, strict=True)]
        *outer, last = [nest.replace(index, names) for index in stage.value.indices]
        return nest.load(stage.value.source, [*outer, ramp(last)])

    lines = [held(line(j)) for j in range(side)]
    half = side // 2
    for _ in range(side.bit_length() - 1):
        pairs = [(lines[i], lines[i + half]) for i in range(half)]
        lines = [held(_interleaved(a, b, start, side)) for a, b in pairs for start in (0, half)]
    for i, value in enumerate(lines):
        *outer, last = indices(nest.i64(i), nest.i64(0))
        statements.append(nest.store(stage.buffer, [*outer, ramp(last)], value))
    return nest.sequence([*allocations, *statements])


def _interleaved(a: Expr, b: Expr, start: int, side: int) -> Expr:
    """a[start], b[start], a[start + 1], ...: one half of two lines."""
    picks = [start + i // 2 + side * (i % 2) for i in range(side)]
    return tirx.Shuffle([a, b], [tirx.const(pick, "int32") for pick in picks])
