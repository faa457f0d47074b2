"""Groups of one stage without reduction: maps, broadcasts, gathers, slices, pads, concatenations, transposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import joined_suffix, may_be_vector, pieces
from kbitc.targets.cpu.rules.crossing import crossing_axis, transposed
from kbitc.targets.cpu.rules.stages import Axis, Stage, at, read_group, same_buffer, uses
from kbitc.targets.target import Target

Expr = Any
Var = Any
Statement = Any
PrimFunc = Any

# Vectors of one parallel task when everything is one long axis.
TASK_VECTORS = 512


def elementwise(function: PrimFunc, target: Target) -> PrimFunc | None:
    """One stage without reduction: vectors along the trailing axes that lie in memory one after the other."""
    group = read_group(function)
    if group is None or len(group.stages) != 1 or group.stages[0].reducer:
        return None
    stage = group.stages[0]
    if not stage.axes:
        return nest.finish(function, nest.store(stage.buffer, [], stage.value))
    crossing = crossing_axis(stage)
    if crossing is not None:
        return nest.finish(function, transposed(stage, crossing, target.lanes))
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
