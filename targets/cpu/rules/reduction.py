"""Groups of one reduction: along memory with 16 partial results, across it with vectors of results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tvm import tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import joined_suffix, may_be_vector, steps_by_one
from kbitc.targets.cpu.rules.partial_sums import join, reduce_line
from kbitc.targets.cpu.rules.stages import Stage, loads_of, read_group
from kbitc.targets.target import Target

Expr = Any
Var = Any
Statement = Any
PrimFunc = Any

# Vectors of results that are reduced side by side, so that one addition need not wait for the one before.
SIDE_BY_SIDE = 4


def reduction(function: PrimFunc, target: Target) -> PrimFunc | None:
    """One reduction stage and nothing else.

    Along: the last reduction axis follows memory; its elements are reduced in the order of `partial_sums`.
    Across: the last spatial axis follows memory; every result sums its elements one after the other.
    """
    group = read_group(function)
    if group is None or len(group.stages) != 1 or not group.stages[0].reducer:
        return None
    stage = group.stages[0]
    loads = loads_of(stage.value)
    last = stage.over[-1].var
    if may_be_vector(stage.value, last) and any(steps_by_one(load, last) for load in loads):
        return nest.finish(function, _results(stage, _along))
    if stage.axes and _follows_last(stage):
        return nest.finish(function, _across(stage))
    return nest.finish(function, _results(stage, _one_by_one))


def _follows_last(stage: Stage) -> bool:
    var = stage.axes[-1].var
    return may_be_vector(stage.value, var) and any(steps_by_one(load, var) for load in loads_of(stage.value))


def _results(stage: Stage, one: Any) -> Statement:
    """Parallel over the results; `one` makes the statement of one of them."""
    extents = [axis.extent for axis in stage.axes]
    if not extents:
        return one(stage, [])
    work = nest.product([axis.extent for axis in stage.over])
    return nest.parallel(nest.product(extents), work, lambda flat: one(stage, nest.split_index(flat, extents)))


def _value(stage: Stage, indices: Sequence[Expr], over: Sequence[Expr]) -> Expr:
    names = [(axis.var, index) for axis, index in zip((*stage.axes, *stage.over), (*indices, *over), strict=True)]
    return nest.replace(stage.value, names)


def _along(stage: Stage, indices: Sequence[Expr]) -> Statement:
    """One result from elements that lie one after the other along the last axis or axes."""
    extents = [axis.extent for axis in stage.over]
    joined = joined_suffix(stage.value, stage.over)
    line = nest.product(extents[len(extents) - joined :])
    outer = extents[: len(extents) - joined]

    def element(flat: Expr, lead: Sequence[Expr]) -> Expr:
        # An index beyond the last axis runs on into the next line, which is where the next element lies.
        zeros = [nest.i64(0)] * (joined - 1)
        return _value(stage, indices, [*lead, *zeros, flat])

    if not outer:
        return reduce_line(
            stage.reducer, stage.start, line, lambda i: element(i, []), lambda r: nest.store(stage.buffer, indices, r)
        )
    total, allocation = nest.scratch(str(stage.start.ty.dtype), 1, "total")

    def row(lead: list[Expr]) -> Statement:
        return reduce_line(
            stage.reducer,
            stage.start,
            line,
            lambda i: element(i, lead),
            lambda r: nest.store(total, [0], join(stage.reducer, nest.load(total, [0]), r)),
        )

    rows = nest.every(outer, row)
    begin = nest.store(total, [0], stage.start)
    return nest.sequence([allocation, begin, rows, nest.store(stage.buffer, indices, nest.load(total, [0]))])


def _one_by_one(stage: Stage, indices: Sequence[Expr]) -> Statement:
    """One result, element after element."""
    total, allocation = nest.scratch(str(stage.start.ty.dtype), 1, "total")
    extents = [axis.extent for axis in stage.over]

    def step(over: list[Expr]) -> Statement:
        value = _value(stage, indices, over)
        return nest.store(total, [0], join(stage.reducer, nest.load(total, [0]), value))

    body = nest.every(extents, step)
    return nest.sequence(
        [
            allocation,
            nest.store(total, [0], stage.start),
            body,
            nest.store(stage.buffer, indices, nest.load(total, [0])),
        ]
    )


def _across(stage: Stage) -> Statement:
    """Vectors of results along the last spatial axis."""
    last = stage.axes[-1].extent
    extents = [axis.extent for axis in stage.axes[:-1]]
    work = nest.product([last, *[axis.extent for axis in stage.over]])

    def row(flat: Expr) -> Statement:
        return _row_of_results(stage, nest.split_index(flat, extents), last)

    return nest.parallel(nest.product(extents), work, row)


def _row_of_results(stage: Stage, outer: Sequence[Expr], last: Expr) -> Statement:
    known = nest.as_int(last)
    wide = SIDE_BY_SIDE * nest.LANES
    parts: list[Statement] = []
    if known is not None:
        begin = 0
        if known >= wide:
            begin = known // wide * wide
            parts.append(nest.loop(known // wide, lambda i: _results_at(stage, outer, i * nest.i64(wide), wide)))
        for lanes in (2 * nest.LANES, nest.LANES, 8, 4, 2, 1):
            if (known - begin) & lanes:
                parts.append(_results_at(stage, outer, nest.i64(begin), lanes))
                begin += lanes
        return nest.sequence(parts)
    whole = tirx.floordiv(last, nest.i64(nest.LANES))
    done = whole * nest.i64(nest.LANES)
    parts.append(nest.loop(whole, lambda i: _results_at(stage, outer, i * nest.i64(nest.LANES), nest.LANES)))
    parts.append(nest.loop(last - done, lambda i: _results_at(stage, outer, done + i, 1)))
    return nest.sequence(parts)


def _results_at(stage: Stage, outer: Sequence[Expr], begin: Expr, count: int) -> Statement:
    """`count` neighbouring results: 1, 2, 4, 8 or a multiple of 16."""
    lanes = min(count, nest.LANES)
    extents = [axis.extent for axis in stage.over]
    dtype = str(stage.start.ty.dtype)
    sums, allocated = zip(*[nest.scratch(dtype, lanes) for _ in range(count // lanes)], strict=True)

    def each(make: Any) -> list[Statement]:
        if lanes == 1:
            return [make(sums[0], nest.i64(0), begin)]
        return [nest.vector(lanes, partial(at_lane, make, part)) for part in range(len(sums))]

    def at_lane(make: Any, part: int, lane: Expr) -> Statement:
        return make(sums[part], lane, begin + nest.i64(part * lanes) + lane)

    def step(over: list[Expr]) -> Statement:
        def add(buffer: Var, lane: Expr, place: Expr) -> Statement:
            value = _value(stage, [*outer, place], over)
            return nest.store(buffer, [lane], join(stage.reducer, nest.load(buffer, [lane]), value))

        return nest.sequence(each(add))

    start = each(lambda buffer, lane, place: nest.store(buffer, [lane], stage.start))
    finish = each(lambda buffer, lane, place: nest.store(stage.buffer, [*outer, place], nest.load(buffer, [lane])))
    return nest.sequence([*allocated, *start, nest.every(extents, step), *finish])
