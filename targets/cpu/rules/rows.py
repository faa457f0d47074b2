"""Groups of several stages over the rows of a matrix, such as softmax and normalisation: one row at a time.

All stages of a row run before the next row, so what they hand to each other stays in registers and the first cache:
a stage with one value a row becomes a scalar, a stage with a value an element is written where the result goes, when
the result reads it only at its own place, and into a buffer of one row otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import equal, may_be_vector
from kbitc.targets.cpu.rules.partial_sums import join, reduce_line
from kbitc.targets.cpu.rules.stages import Group, Stage, loads_of, read_group, same_buffer, uses
from kbitc.targets.target import Target

Expr = Any
Var = Any
Statement = Any
PrimFunc = Any

# Elements of one operation that a row of n elements counts as, for the choice of threads.
WORK_PER_ELEMENT = 3


@dataclass
class _Places:
    """Where the internal buffers of a group live while one row is computed."""

    scalars: list[tuple[Var, Var]] = field(default_factory=list)
    lines: list[tuple[Var, Var]] = field(default_factory=list)
    in_result: list[tuple[Var, Var]] = field(default_factory=list)
    allocated: list[Statement] = field(default_factory=list)


def rows(function: PrimFunc, target: Target) -> PrimFunc | None:
    """Two or more stages that share their first axis."""
    group = read_group(function)
    if group is None or len(group.stages) < 2 or not all(_fits(stage, group.stages[0]) for stage in group.stages):
        return None
    written = tuple(stage.buffer for stage in group.stages)
    if not all(_reads_own_row(stage, written) for stage in group.stages):
        return None
    count = group.stages[0].axes[0].extent
    width = max((stage for stage in group.stages), key=lambda stage: len(stage.axes) + len(stage.over))
    work = nest.product([axis.extent for axis in (*width.axes[1:], *width.over)])

    def row(index: Expr) -> Statement:
        places = _places(group)
        statements = [_stage(stage, index, places) for stage in group.stages]
        return nest.sequence([*places.allocated, *statements])

    return nest.finish(function, nest.parallel(count, nest.product([work, nest.i64(WORK_PER_ELEMENT)]), row))


def _fits(stage: Stage, first: Stage) -> bool:
    """One value a row, reduced over one axis or not, or one value an element."""
    if not stage.axes or not equal(stage.axes[0].extent, first.axes[0].extent):
        return False
    if stage.reducer:
        return len(stage.axes) == 1 and len(stage.over) == 1
    return len(stage.axes) <= 2


def _reads_own_row(stage: Stage, written: tuple[Var, ...]) -> bool:
    """Whether a stage reads what the group computes only in its own row, along its own second axis."""
    own = stage.axes[0].var
    second = (stage.over or stage.axes[1:])[0].var if stage.over or len(stage.axes) > 1 else None
    for load in loads_of(stage.value):
        if not any(same_buffer(load.source, buffer) for buffer in written):
            continue
        if not load.indices[0].same_as(own):
            return False
        if len(load.indices) == 2 and (second is None or not load.indices[1].same_as(second)):
            return False
    return True


def _places(group: Group) -> _Places:
    places = _Places()
    outputs = [stage for stage in group.stages if not _is_in(stage.buffer, group.internal)]
    for stage in group.stages:
        if stage in outputs:
            continue
        dtype = str(stage.buffer.ty.dtype)
        if len(stage.axes) == 1:
            buffer, allocation = nest.scratch(dtype, 1, stage.name)
            places.scalars.append((stage.buffer, buffer))
            places.allocated.append(allocation)
            continue
        target = _result_for(stage, outputs, group)
        if target is not None and not places.in_result:
            places.in_result.append((stage.buffer, target.buffer))
            continue
        line = tirx.decl_buffer((stage.axes[1].extent,), dtype, name=stage.name)
        places.lines.append((stage.buffer, line))
        places.allocated.append(tirx.AllocBuffer(line))
    return places


def _is_in(buffer: Var, buffers: tuple[Var, ...]) -> bool:
    return any(same_buffer(buffer, other) for other in buffers)


def _result_for(stage: Stage, outputs: list[Stage], group: Group) -> Stage | None:
    """The output whose row may hold a stage until it is overwritten by its own value: the last thing computed."""
    last = group.stages[-1]
    if last not in outputs or len(last.axes) != 2 or str(last.buffer.ty.dtype) != str(stage.buffer.ty.dtype):
        return None
    return last if equal(last.axes[1].extent, stage.axes[1].extent) else None


def _stage(stage: Stage, row: Expr, places: _Places) -> Statement:
    """One stage of one row."""
    value = nest.replace(_redirect(stage.value, row, places), [(stage.axes[0].var, row)])
    if stage.reducer:
        over = stage.over[0]
        if may_be_vector(value, over.var):
            return reduce_line(
                stage.reducer,
                stage.start,
                over.extent,
                lambda i: nest.replace(value, [(over.var, i)]),
                lambda result: _write(stage, row, None, result, places),
            )
        return _reduced_one_by_one(stage, row, value, places)
    if len(stage.axes) == 1:
        return _write(stage, row, None, value, places)
    column = stage.axes[1]
    prepared, value = _inverted(value, column.var)
    # A result that overwrites a stage must not be computed twice.
    in_place = any(same_buffer(target, stage.buffer) for _, target in places.in_result)

    def element(i: Expr) -> Statement:
        return _write(stage, row, i, nest.replace(value, [(column.var, i)]), places)

    if may_be_vector(value, column.var):
        return nest.sequence([*prepared, nest.across(column.extent, element, repeatable=not in_place)])
    return nest.sequence([*prepared, nest.loop(column.extent, element)])


def _inverted(value: Expr, column: Var) -> tuple[list[Statement], Expr]:
    """x / d with d the same for a whole row as x * (1 / d), which is at most one rounding further from the quotient."""
    prepared: list[Statement] = []

    def divide(node: Any) -> Expr:
        if str(node.ty.dtype) != "float32" or not isinstance(node.b, ir.TensorLoad) or uses(node.b, column):
            return node
        buffer, allocation = nest.scratch("float32", 1, "inverse")
        prepared.extend([allocation, nest.store(buffer, [0], tirx.const(1.0, "float32") / node.b)])
        return node.a * nest.load(buffer, [0])

    changed = tvm_ffi.structural_map(value, [(tirx.Div, divide)], order="post")
    return prepared, changed


def _reduced_one_by_one(stage: Stage, row: Expr, value: Expr, places: _Places) -> Statement:
    over = stage.over[0]
    total, allocation = nest.scratch(str(stage.start.ty.dtype), 1, "total")

    def step(i: Expr) -> Statement:
        added = join(stage.reducer, nest.load(total, [0]), nest.replace(value, [(over.var, i)]))
        return nest.store(total, [0], added)

    done = _write(stage, row, None, nest.load(total, [0]), places)
    return nest.sequence([allocation, nest.store(total, [0], stage.start), nest.loop(over.extent, step), done])


def _find(buffer: Var, pairs: list[tuple[Var, Var]]) -> Var | None:
    return next((place for known, place in pairs if same_buffer(known, buffer)), None)


def _redirect(value: Expr, row: Expr, places: _Places) -> Expr:
    """The value with reads of internal buffers turned to where they live."""

    def read(load: Any) -> Expr:
        scalar = _find(load.source, places.scalars)
        if scalar is not None:
            return nest.load(scalar, [0])
        line = _find(load.source, places.lines)
        if line is not None:
            return nest.load(line, [load.indices[1]])
        result = _find(load.source, places.in_result)
        return load if result is None else nest.load(result, [row, load.indices[1]])

    return tvm_ffi.structural_map(value, [(ir.TensorLoad, read)], order="post")


def _write(stage: Stage, row: Expr, column: Expr | None, value: Expr, places: _Places) -> Statement:
    scalar = _find(stage.buffer, places.scalars)
    if scalar is not None:
        return nest.store(scalar, [0], value)
    if column is None:
        return nest.store(stage.buffer, [row], value)
    line = _find(stage.buffer, places.lines)
    if line is not None:
        return nest.store(line, [column], value)
    result = _find(stage.buffer, places.in_result)
    return nest.store(stage.buffer if result is None else result, [row, column], value)
