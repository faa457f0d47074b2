"""Reductions of one line in a stated order that every CPU target shares.

Element c goes to lane c mod 16 of chain (c div 16) mod 4, each lane in increasing c; the elements of a last vector
that is not full go to chain 3. With fewer than 64 elements known at compile time there is one chain. The chains are
joined as (0 + 1) + (2 + 3), then the 16 lanes by halves: lane i with lane i + 8, then i + 4, i + 2, i + 1. The result
does not depend on threads or on the vector length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.kernels.mathfn import fma

Expr = Any
Var = Any
Statement = Any

CHAINS = 4
_JOIN = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "max": tirx.max,
    "min": tirx.min,
}


def join(reducer: str, a: Expr, b: Expr) -> Expr:
    """One step of a reduction; a is what is reduced so far.

    A product is added by an explicit fma: what a code generator contracts by itself differs from target to target.
    """
    if reducer != "sum" or not str(b.ty.dtype).startswith("float32"):
        return _JOIN[reducer](a, b)
    names: list[tuple[Var, Expr]] = []
    inner = b
    while isinstance(inner, tirx.Let):
        names.append((inner.var, inner.value))
        inner = inner.body
    if not isinstance(inner, tirx.Mul):
        return a + b
    total = fma(inner.a, inner.b, a)
    for name, bound in reversed(names):
        total = tirx.Let(name, bound, total)
    return total


def reduce_line(
    reducer: str, start: Expr, extent: Expr, element: Callable[[Expr], Expr], done: Callable[[Expr], Statement]
) -> Statement:
    """Reduce element(0) .. element(extent - 1).

    Args:
        reducer: "sum", "prod", "max" or "min".
        start: its identity.
        extent: number of elements.
        element: the value at an index; becomes a vector.
        done: makes the statement that uses the result.
    """
    dtype = str(start.ty.dtype)
    known = nest.as_int(extent)
    chains = CHAINS if known is None or known >= CHAINS * nest.LANES else 1
    sums, allocated = zip(*[nest.scratch(dtype) for _ in range(chains)], strict=True)
    width = nest.LANES * chains

    def add(chain: int, begin: Expr) -> Statement:
        def lane_of(lane: Expr) -> Statement:
            value = element(begin + nest.i64(chain * nest.LANES) + lane)
            return nest.store(sums[chain], [lane], join(reducer, nest.load(sums[chain], [lane]), value))

        return nest.vector(nest.LANES, lane_of)

    def group(i: Expr) -> Statement:
        return nest.sequence([add(chain, i * nest.i64(width)) for chain in range(chains)])

    whole = known // width if known is not None else tirx.floordiv(extent, nest.i64(width))
    statements: list[Statement] = [*allocated]
    statements += [nest.vector(nest.LANES, partial(_set, buffer, start)) for buffer in sums]
    if known is None or whole:
        statements.append(nest.loop(whole, group))
    statements += _remaining(reducer, extent, width, chains, sums, add, element)
    result, allocation = nest.scratch(dtype, 1, "result")
    statements += [allocation, nest.store(result, [0], _tree(reducer, sums))]
    return nest.sequence([*statements, done(nest.load(result, [0]))])


def _set(buffer: Var, value: Expr, lane: Expr) -> Statement:
    return nest.store(buffer, [lane], value)


def _remaining(
    reducer: str,
    extent: Expr,
    width: int,
    chains: int,
    sums: tuple[Var, ...],
    add: Callable[[int, Expr], Statement],
    element: Callable[[Expr], Expr],
) -> list[Statement]:
    """The elements behind the last whole group: vectors into their chains, then single lanes."""
    known = nest.as_int(extent)
    if known is not None:
        begin, lanes = known // width * width, known % nest.LANES
        statements = [add(c, nest.i64(begin)) for c in range((known - begin) // nest.LANES)]
        return statements + (_lanes(reducer, sums[-1], known - lanes, lanes, element) if lanes else [])
    start = tirx.floordiv(extent, nest.i64(width)) * nest.i64(width)
    left = tirx.floordiv(extent - start, nest.i64(nest.LANES))
    nested: Statement | None = None
    for chain in reversed(range(chains - 1)):
        inside = nest.sequence([add(chain, start), nested])
        nested = tirx.IfThenElse(left > nest.i64(chain), inside, None)
    first = start + left * nest.i64(nest.LANES)
    tail = nest.sequence(_lanes(reducer, sums[-1], first, extent - first, element))
    return [nested, tirx.IfThenElse(extent > first, tail, None)]


def _lanes(reducer: str, sums: Var, first: Expr, count: Expr, element: Callable[[Expr], Expr]) -> list[Statement]:
    """Elements first .. first + count - 1, fewer than 16, into the lanes from 0 on.

    They go through a copy in memory: a lane chosen at run time would keep the chain itself out of registers.
    """
    copy, allocation = nest.scratch(str(sums.ty.dtype), nest.LANES, "lanes")
    spill = nest.vector(nest.LANES, lambda lane: nest.store(copy, [lane], nest.load(sums, [lane])))
    fill = nest.vector(nest.LANES, lambda lane: nest.store(sums, [lane], nest.load(copy, [lane])))
    body = nest.loop(
        count,
        lambda i: nest.store(copy, [i], join(reducer, nest.load(copy, [i]), element(nest.i64(first) + i))),
    )
    return [allocation, spill, body, fill]


def _tree(reducer: str, sums: tuple[Var, ...]) -> Expr:
    """All chains and lanes as one scalar."""
    wide = [buffer[tirx.Ramp(nest.i64(0), nest.i64(1), nest.LANES)] for buffer in sums]
    while len(wide) > 1:
        wide = [join(reducer, wide[i], wide[i + 1]) for i in range(0, len(wide), 2)]
    lanes, value = nest.LANES, wide[0]
    names = []
    while lanes > 1:
        name = tirx.Var("t", value.ty.dtype)
        names.append((name, value))
        half = lanes // 2
        low, high = (_part(name, start, half) for start in (0, half))
        value, lanes = join(reducer, low, high), half
    for name, bound in reversed(names):
        value = tirx.Let(name, bound, value)
    return value


def _part(value: Expr, start: int, count: int) -> Expr:
    """`count` lanes of a vector."""
    return tirx.Shuffle([value], [tirx.const(start + i, "int32") for i in range(count)])
