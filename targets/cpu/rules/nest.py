"""Statements of a schedule: loops, views, vectors of 16 lanes with a tail, and the choice to run in parallel.

Every CPU target works in vectors of 16 lanes (LLVM splits them where registers are smaller), so that sums have the
same order and results the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx

from kbitc.targets.kernels.lets import lower_lets, name_sizes
from kbitc.targets.lower import dims

Expr = Any
Var = Any
Statement = Any
PrimFunc = Any

LANES = 16
# Elements of work (an element of an expression of about ten operations) below which threads cost more than they save.
PARALLEL_WORK = 32768
# Iterations of a small loop, such as the taps of a window, that are written one after the other.
WRITTEN_OUT = 16


def i64(value: Any) -> Expr:
    """An int64 index."""
    return tirx.const(value, "int64") if isinstance(value, int) else value


def as_int(value: Expr) -> int | None:
    """The value of a constant index, None for others."""
    if isinstance(value, int):
        return value
    return int(value.value) if isinstance(value, tirx.IntImm) else None


def product(extents: Sequence[Expr]) -> Expr:
    """Product of extents, folded where they are constant."""
    constant, total = 1, None
    for extent in extents:
        known = as_int(extent)
        if known is not None:
            constant *= known
        else:
            total = extent if total is None else total * extent
    if total is None:
        return i64(constant)
    return total if constant == 1 else total * i64(constant)


def sequence(statements: Sequence[Statement]) -> Statement:
    """Statements one after the other."""
    flat = [statement for statement in statements if statement is not None]
    if not flat:
        return tirx.Evaluate(tirx.const(0, "int32"))
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def replace(node: Any, names: Sequence[tuple[Var, Expr]]) -> Any:
    """The expression or statement with variables replaced."""
    if not names:
        return node

    def swap(var: Var) -> Expr:
        for name, value in names:
            if name.same_as(var):
                return value
        return var

    return tvm_ffi.structural_map(node, [(tirx.Var, swap)], order="post")


def loop(extent: Expr, body: Callable[[Expr], Statement], kind: Any = None, name: str = "i") -> Statement:
    """A loop from 0; a serial one of extent 1 is only its body, and one of extent 0 does nothing."""
    kind = tirx.ForKind.SERIAL if kind is None else kind
    if as_int(extent) == 0:
        return sequence([])
    if as_int(extent) == 1 and kind != tirx.ForKind.VECTORIZED:
        return body(i64(0))
    variable = tirx.Var(name, "int64")
    return tirx.For(variable, i64(0), i64(extent), kind, body(variable))


def every(extents: Sequence[Expr], body: Callable[[list[Expr]], Statement]) -> Statement:
    """Nested loops over several extents; a few iterations known at compile time are written out."""
    total = as_int(product(extents))
    if total is not None and 1 < total <= WRITTEN_OUT:
        sizes = [as_int(extent) or 1 for extent in extents]
        return sequence([body([i64(int(i)) for i in np.unravel_index(flat, sizes)]) for flat in range(total)])
    if not extents:
        return body([])
    return loop(extents[0], lambda first: every(extents[1:], lambda rest: body([first, *rest])))


def vector(lanes: int, body: Callable[[Expr], Statement]) -> Statement:
    """A vectorised loop; `body` gets the lane."""
    return loop(lanes, body, tirx.ForKind.VECTORIZED, "lane")


def parallel(extent: Expr, work: Expr, body: Callable[[Expr], Statement]) -> Statement:
    """A loop whose iterations may run in parallel, of `work` elements each; in one thread when that is little."""
    total = as_int(product([extent, work]))
    serial = loop(extent, body)
    if as_int(extent) == 1 or (total is not None and total < PARALLEL_WORK):
        return serial
    threaded = loop(extent, body, tirx.ForKind.PARALLEL)
    if total is not None:
        return threaded
    enough = tirx.And(i64(extent) > i64(1), product([extent, work]) >= i64(PARALLEL_WORK))
    return tirx.IfThenElse(enough, threaded, serial)


def across(extent: Expr, body: Callable[[Expr], Statement], *, repeatable: bool) -> Statement:
    """Element by element over an extent, in vectors.

    Args:
        extent: number of elements.
        body: the statement of one element.
        repeatable: an element may be computed twice, so that the tail can be a whole vector that overlaps the last.
    """
    known = as_int(extent)
    if known is not None:
        return _across_known(known, body, repeatable)
    whole = tirx.floordiv(extent, i64(LANES))
    main = loop(whole, lambda i: vector(LANES, lambda lane: body(i * i64(LANES) + lane)))
    rest = tirx.floormod(extent, i64(LANES))
    scalar = loop(rest, lambda i: body(whole * i64(LANES) + i))
    if not repeatable:
        return sequence([main, scalar])
    overlapping = vector(LANES, lambda lane: body(extent - i64(LANES) + lane))
    # A branch that is never taken is not written: TVM simplifies sizes inside it until it divides by zero.
    enough = dims.provably(extent >= i64(LANES))
    tail = overlapping if enough else tirx.IfThenElse(whole > i64(0), overlapping, scalar)
    return sequence([main, tirx.IfThenElse(rest > i64(0), tail, None)])


def _across_known(extent: int, body: Callable[[Expr], Statement], repeatable: bool) -> Statement:
    whole, rest = divmod(extent, LANES)
    parts = []
    if whole:
        parts.append(loop(whole, lambda i: vector(LANES, lambda lane: body(i * i64(LANES) + lane))))
    if rest and whole and repeatable:
        parts.append(vector(LANES, lambda lane: body(i64(extent - LANES) + lane)))
        return sequence(parts)
    place = whole * LANES
    for lanes in (8, 4, 2, 1):
        if rest & lanes:
            parts.append(_piece(lanes, place, body))
            place += lanes
    return sequence(parts)


def _piece(lanes: int, start: int, body: Callable[[Expr], Statement]) -> Statement:
    """`lanes` elements from `start` on."""
    return vector(lanes, lambda lane: body(i64(start) + lane)) if lanes > 1 else body(i64(start))


def scratch(dtype: str, lanes: int = LANES, name: str = "sums") -> tuple[Var, Statement]:
    """A small local buffer and its allocation. LLVM keeps it in registers when its indices are known."""
    buffer = tirx.decl_buffer((i64(lanes),), dtype, name=name)
    return buffer, tirx.AllocBuffer(buffer)


def store(buffer: Var, indices: Sequence[Expr], value: Expr) -> Statement:
    """buffer[indices] = value."""
    return tirx.BufferStore(buffer, value, [i64(index) for index in indices])


def load(buffer: Var, indices: Sequence[Expr]) -> Expr:
    """buffer[indices]."""
    return buffer[tuple(map(i64, indices))]


def split_index(flat: Expr, extents: Sequence[Expr]) -> list[Expr]:
    """The indices of a flat row-major index."""
    indices: list[Expr] = []
    for extent in reversed(extents[1:]):
        if as_int(extent) == 1:
            indices.append(i64(0))
            continue
        indices.append(tirx.floormod(flat, extent))
        flat = tirx.floordiv(flat, extent)
    return [flat, *reversed(indices)] if extents else []


def finish(function: PrimFunc, body: Statement) -> PrimFunc:
    """The function with a new body, its names made cheap to compile."""
    return lower_lets(function.with_body(name_sizes(function, body)))
