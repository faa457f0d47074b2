"""What the indices of an expression do when one variable moves: may it become a vector?"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm import sym as arithmetic

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.stages import Axis, loads_of, uses, uses_any
from kbitc.targets.kernels.lets import is_guard

Expr = Any
Var = Any

# More pieces of one line than this are not worth their code.
MOST_PIECES = 12
_COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ)
_DIVISIONS = (tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)


def equal(a: Expr, b: Expr) -> bool:
    """Whether two dimensions are provably the same."""
    return bool(arithmetic.Analyzer().can_prove_equal(a, b))


def unit_stride(index: Expr, var: Var) -> bool:
    """Whether an index is the variable plus something that does not contain it."""
    if isinstance(index, tirx.Var):
        return bool(index.same_as(var))
    if isinstance(index, tirx.Add):
        left, right = uses(index.a, var), uses(index.b, var)
        return left != right and unit_stride(index.a if left else index.b, var)
    if isinstance(index, tirx.Sub):
        return not uses(index.b, var) and unit_stride(index.a, var)
    return False


def steps_by_one(load: Any, var: Var) -> bool:
    """Whether a read moves by one element with the variable; that of a scalar does not move."""
    if not load.indices:
        return False
    *outer, last = load.indices
    return not any(uses(index, var) for index in outer) and unit_stride(last, var)


def _branches_on(value: Expr, var: Var) -> bool:
    """Whether a condition that guards memory, or an integer division, depends on the variable."""
    found = False

    def call(node: Any) -> None:
        nonlocal found
        if is_guard(node) and uses(node.args[0], var):
            found = True

    def division(node: Any) -> None:
        nonlocal found
        if "int" in str(node.ty.dtype) and uses(node, var):
            found = True

    tvm_ffi.structural_walk(value, ((ir.Call, call), (_DIVISIONS, division)))
    return found


def may_be_vector(value: Expr, var: Var) -> bool:
    """Whether an expression becomes plain vector code when the variable does: no gathers, no branches by lane."""
    if _branches_on(value, var):
        return False
    return all(steps_by_one(load, var) or not any(uses(i, var) for i in load.indices) for load in loads_of(value))


def outside_of_loads(value: Expr, variables: list[Var]) -> bool:
    """Whether one of the variables occurs outside of the indices of reads."""
    bare = tvm_ffi.structural_map(
        value, [(ir.TensorLoad, lambda load: tirx.const(0, str(load.ty.dtype)))], order="post"
    )
    return uses_any(bare, variables)


def joined_suffix(value: Expr, axes: tuple[Axis, ...]) -> int:
    """How many trailing axes every read runs through in the same order as memory, so that they are one axis.

    A read may also ignore all of them. At least 1.
    """
    loads = loads_of(value)
    best = 1
    for count in range(2, len(axes) + 1):
        suffix = axes[len(axes) - count :]
        variables = [axis.var for axis in suffix]
        if outside_of_loads(value, variables) or not all(_runs_through(load, suffix, variables) for load in loads):
            break
        best = count
    return best


def _runs_through(load: Any, suffix: tuple[Axis, ...], variables: list[Var]) -> bool:
    if not any(uses_any(index, variables) for index in load.indices):
        return True
    if len(load.indices) < len(suffix):
        return False
    split = len(load.indices) - len(suffix)
    if any(uses_any(index, variables) for index in load.indices[:split]):
        return False
    shape = load.source.ty.shape[split:]
    return all(
        index.same_as(axis.var) and equal(dim, axis.extent)
        for index, axis, dim in zip(load.indices[split:], suffix, shape, strict=True)
    )


def pieces(value: Expr, axis: Axis) -> list[tuple[int, int, Expr]] | None:
    """The axis cut where a guard changes: (begin, end, the value there without the guard).

    Before: if_then_else(j < 4, a[j], b[j - 4]) for j in 0..12
    After: (0, 4, a[j]), (4, 12, b[j - 4])
    Keeps it whole (None) when the extent or a place of change is not known now, or there are too many.
    """
    extent = nest.as_int(axis.extent)
    guards: list[Any] = []
    tvm_ffi.structural_walk(
        value,
        ((ir.Call, lambda node: guards.append(node) if is_guard(node) and uses(node.args[0], axis.var) else None),),
    )
    if extent is None or not guards:
        return None
    cuts = {0, extent}
    for guard in guards:
        found = _changes(guard.args[0], axis.var)
        if found is None:
            return None
        cuts.update(cut for cut in found if 0 < cut < extent)
    places = sorted(cuts)
    if len(places) - 1 > MOST_PIECES:
        return None
    return [(begin, end, _decided(value, axis.var, begin, end)) for begin, end in zip(places, places[1:], strict=False)]


def _changes(condition: Expr, var: Var) -> set[int] | None:
    """Values of the variable at which a comparison inside the condition may change; None when they are not known."""
    comparisons: list[Any] = []
    tvm_ffi.structural_walk(condition, ((_COMPARISONS, comparisons.append),))
    analyzer = arithmetic.Analyzer()
    cuts: set[int] = set()
    for comparison in comparisons:
        if not uses(comparison, var):
            continue
        difference = comparison.a - comparison.b
        at_zero, at_one = (
            nest.as_int(analyzer.simplify(nest.replace(difference, [(var, nest.i64(place))]))) for place in (0, 1)
        )
        if at_zero is None or at_one is None or abs(at_one - at_zero) != 1:
            return None
        slope = at_one - at_zero
        crossing = -at_zero * slope
        if isinstance(comparison, tirx.EQ):
            cuts.update((crossing, crossing + 1))
        elif isinstance(comparison, (tirx.LT, tirx.GE) if slope > 0 else (tirx.LE, tirx.GT)):
            cuts.add(crossing)
        else:
            cuts.add(crossing + 1)
    return cuts


def _decided(value: Expr, var: Var, begin: int, end: int) -> Expr:
    """The value with every guard gone that is known for begin <= var < end."""
    analyzer = arithmetic.Analyzer()
    analyzer.bind(var, ir.Range(nest.i64(begin), nest.i64(end)))

    def decide(node: Any) -> Expr:
        if not is_guard(node):
            return node
        if analyzer.can_prove(node.args[0]):
            return node.args[1]
        return node.args[2] if analyzer.can_prove(tirx.Not(node.args[0])) else node

    return tvm_ffi.structural_map(value, [(ir.Call, decide)], order="post")
