"""Reads a TE group as a list of stages: what each one computes at which indices, without its loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.s_tir import SBlockRealize

from kbitc.targets.cpu.rules import nest

Expr = Any
Var = Any
PrimFunc = Any
Statement = Any

_SUM_LIKE = {tirx.Add: "sum", tirx.Mul: "prod", tirx.Max: "max", tirx.Min: "min"}


@dataclass(frozen=True)
class Axis:
    """One index variable of a stage and how far it runs (from 0)."""

    var: Var
    extent: Expr


@dataclass(frozen=True)
class Stage:
    """One block of a group: ``buffer[indices] = value``, or a reduction of `value` over the axes `over`.

    Attributes:
        name: of the TE tensor.
        buffer: written.
        axes: spatial axes; the block stores at exactly their variables, in order.
        over: reduction axes; empty for none.
        reducer: "sum", "prod", "max" or "min"; "" without reduction.
        start: value that a reduction starts from; None without.
        value: what is stored or reduced.
    """

    name: str
    buffer: Var
    axes: tuple[Axis, ...]
    over: tuple[Axis, ...]
    reducer: str
    start: Expr
    value: Expr


@dataclass(frozen=True)
class Group:
    """A group: its function, stages in order, and buffers that are neither inputs nor outputs."""

    function: PrimFunc
    stages: tuple[Stage, ...]
    internal: tuple[Var, ...]


def same_buffer(a: Var, b: Var) -> bool:
    """Whether two names are the same buffer."""
    return bool(a.same_as(b))


def loads_of(value: Expr) -> list[Any]:
    """Every read of a buffer in an expression."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, ((ir.TensorLoad, found.append),))
    return found


def uses(value: Expr, var: Var) -> bool:
    """Whether a variable occurs in an expression."""
    return uses_any(value, [var])


def uses_any(value: Expr, variables: list[Var]) -> bool:
    """Whether one of the variables occurs in an expression."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, ((tirx.Var, found.append),))
    return any(name.same_as(var) for name in found for var in variables)


def read_group(function: PrimFunc) -> Group | None:
    """The stages of a TE group; None when it is not a plain sequence of single blocks with full loops."""
    root = function.body
    if not isinstance(root, SBlockRealize):
        return None
    body = root.block.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    stages = []
    for statement in statements:
        stage = _read_stage(statement)
        if stage is None:
            return None
        stages.append(stage)
    return Group(function, tuple(stages), tuple(root.block.alloc_buffers))


def _read_stage(statement: Any) -> Stage | None:
    loops = []
    while isinstance(statement, tirx.For):
        loops.append(statement)
        statement = statement.body
    if not isinstance(statement, SBlockRealize) or not isinstance(statement.block.body, tirx.BufferStore):
        return None
    block = statement.block
    spatial: list[Axis] = []
    over: list[Axis] = []
    if len(block.iter_vars) != len(loops):
        return None
    for iteration, bound, loop in zip(block.iter_vars, statement.iter_values, loops, strict=True):
        if not (isinstance(bound, tirx.Var) and bound.same_as(loop.loop_var)):
            return None
        target = over if iteration.iter_type == tirx.IterVar.CommReduce else spatial
        target.append(Axis(iteration.var, loop.extent))
    store = block.body
    if len(store.indices) != len(spatial):
        return None
    if any(not index.same_as(axis.var) for index, axis in zip(store.indices, spatial, strict=True)):
        return None
    return _stage(block, store, tuple(spatial), tuple(over))


def _stage(block: Any, store: Any, spatial: tuple[Axis, ...], over: tuple[Axis, ...]) -> Stage | None:
    name = str(block.name_hint)
    if block.init is None:
        return None if over else Stage(name, store.buffer, spatial, (), "", None, store.value)
    value = store.value
    reducer = _SUM_LIKE.get(type(value))
    if reducer is None or not isinstance(block.init, tirx.BufferStore):
        return None
    if not (isinstance(value.a, ir.TensorLoad) and same_buffer(value.a.source, store.buffer)):
        return None
    return Stage(name, store.buffer, spatial, over, reducer, block.init.value, value.b)


def at(stage: Stage, indices: Sequence[Expr]) -> Statement:
    """The store of one element."""
    names = [(axis.var, index) for axis, index in zip(stage.axes, indices, strict=True)]
    return nest.store(stage.buffer, indices, nest.replace(stage.value, names))
