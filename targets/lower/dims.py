"""Arithmetic on dimensions. A dimension is a Python int, or an int64 tvm expression over symbolic dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Range

from kbitc.targets.lower.contraction import Dim

# Symbolic dimensions are sizes of tensors in memory: not negative, and far below this.
LARGEST_DIM = 2**40


def symbol(name: str) -> Dim:
    """A new symbolic dimension."""
    return tirx.Var(name, "int64")


def is_static(dim: Dim) -> bool:
    """Whether a dimension is a number."""
    return isinstance(dim, int)


def as_dim(value: Any) -> Dim:
    """An int where the value is an integer constant of any kind, otherwise the expression itself."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    return value


def variables(dim: Dim) -> list[Any]:
    """The symbolic dimensions inside an expression, each once, in the order of their first use."""
    if is_static(dim):
        return []
    found: list[Any] = []

    def visit(variable: Any) -> None:
        if not any(variable.same_as(other) for other in found):
            found.append(variable)

    tvm_ffi.structural_walk(dim, (tirx.Var, visit), order="post")
    return found


def _analyzer(*dims: Dim) -> Any:
    """An analyzer that knows the range of every symbolic dimension of the expressions."""
    analyzer = sym.Analyzer()
    for dim in dims:
        for variable in variables(dim):
            if str(variable.ty.dtype) == "int64":
                analyzer.bind(variable, Range(0, LARGEST_DIM), allow_override=True)
    return analyzer


def simplify(dim: Dim) -> Dim:
    """The shortest form that tvm's rewriter finds."""
    dim = as_dim(dim)
    if is_static(dim) or isinstance(dim, tirx.Var):
        return dim
    return as_dim(_analyzer(dim).simplify(dim))


def equal(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are the same for every value of the symbols, as far as can be proved."""
    if is_static(a) and is_static(b):
        return bool(a == b)
    if not is_static(a) and not is_static(b):
        if a.same_as(b) or tvm_ffi.structural_equal(a, b):
            return True
        return bool(_analyzer(a, b).can_prove_equal(a, b)) or _equal_by_cases(a, b)
    return False


def _equal_by_cases(a: Dim, b: Dim) -> bool:
    """Whether a = b on both sides of one bend of their minima and maxima: min(1, n) + max(n - 1, 0) is n.

    tvm does not tell cases apart by itself. Tried are n < c and n >= c for each symbol n and each constant c > 0.
    """
    whole = a + b
    bends: list[Any] = []
    constants: set[int] = set()
    tvm_ffi.structural_walk(whole, ((tirx.Min, tirx.Max), bends.append), order="post")
    if not bends:
        return False
    tvm_ffi.structural_walk(whole, (tirx.IntImm, lambda number: constants.add(abs(int(number.value)))), order="post")
    analyzer = _analyzer(a, b)

    def holds(condition: Any) -> bool:
        with analyzer.constraint_scope(condition):
            return bool(analyzer.can_prove_equal(a, b))

    return any(
        holds(symbol < constant) and holds(symbol >= constant)
        for symbol in variables(whole)
        for constant in sorted(constants - {0})
    )


def never_equal(a: Dim, b: Dim) -> bool:
    """Whether two dimensions differ for every value of the symbols, as far as can be proved."""
    if is_static(a) and is_static(b):
        return bool(a != b)
    return bool(_analyzer(a, b).can_prove(tirx.NE(expression(a), expression(b))))


def provably(condition: Any) -> bool:
    """Whether a boolean expression over dimensions is always true, as far as can be proved."""
    if isinstance(condition, bool):
        return condition
    return bool(_analyzer(condition).can_prove(condition))


def defines_itself(given: Sequence[Dim], wanted: Sequence[Dim]) -> bool:
    """Whether a wanted size that is a symbol would be defined by an expression that holds it, as n by min(n, 3)."""
    return any(
        not is_static(new) and not equal(old, new) and any(symbol.same_as(new) for symbol in variables(old))
        for old, new in zip(given, wanted, strict=True)
    )


def expression(dim: Dim) -> Any:
    """The dimension as a tvm expression."""
    return tirx.IntImm("int64", dim) if is_static(dim) else dim


def product(dims: Iterable[Dim]) -> Dim:
    """The product of dimensions; 1 for none."""
    number = 1
    symbolic = None
    for dim in dims:
        if is_static(dim):
            number *= dim
        else:
            symbolic = dim if symbolic is None else symbolic * dim
    if symbolic is None or number == 0:
        return number
    return simplify(symbolic * number) if number != 1 else simplify(symbolic)


def ceil_divide(a: Dim, b: int) -> Dim:
    """ceil(a / b) for a not negative."""
    if is_static(a):
        return -(-a // b)
    return simplify(tirx.floordiv(a + (b - 1), b))


def floor_divide(a: Dim, b: Dim) -> Dim:
    """floor(a / b)."""
    if is_static(a) and is_static(b):
        return a // b
    return simplify(tirx.floordiv(expression(a), expression(b)))


def divide_exactly(whole: Sequence[Dim], parts: Sequence[Dim]) -> Dim:
    """product(whole) / product(parts) where the division is known to leave no rest.

    Factors that stand on both sides are cancelled first, because tvm does not cancel symbolic ones.
    """
    left, right = list(whole), list(parts)
    for part in parts:
        for index, factor in enumerate(left):
            if not is_static(part) and equal(part, factor):
                del left[index]
                right = [item for item in right if item is not part]
                break
    return floor_divide(product(left), product(right))


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of two dimensions."""
    if is_static(a) and is_static(b):
        return max(a, b)
    return simplify(tirx.max(expression(a), expression(b)))


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of two dimensions."""
    if is_static(a) and is_static(b):
        return min(a, b)
    return simplify(tirx.min(expression(a), expression(b)))


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are provably the same."""
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def text(shape: Sequence[Dim]) -> str:
    """A shape for a message, such as [batch, 3, 48]."""
    return "[" + ", ".join(str(dim) for dim in shape) + "]"
