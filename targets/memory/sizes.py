"""Sizes of tensors in bytes as expressions of symbolic dims: each distinct one once, by place."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _truncated(a: int, b: int) -> int:
    """The quotient without its fraction, as C divides."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# What a size may be made of, beside numbers, symbols and casts: of ints, and what tirx calls the same of expressions.
_OPERATORS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "Add": (operator.add, ""),
    "Sub": (operator.sub, ""),
    "Mul": (operator.mul, ""),
    "FloorDiv": (operator.floordiv, "floordiv"),
    "FloorMod": (operator.mod, "floormod"),
    "Div": (_truncated, "truncdiv"),
    "Mod": (lambda a, b: a - b * _truncated(a, b), "truncmod"),
    "Min": (min, "min"),
    "Max": (max, "max"),
}
# Bytes; as TVM's own allocations. All sizes here are multiples of it, so that sums of them are offsets.
ALIGNMENT = 64


class Sizes:
    """The distinct sizes of the tensors of one function.

    Attributes:
        expressions: bytes, multiples of ALIGNMENT: ints and int64 tvm expressions, none negative, by place.
        symbols: the symbolic dims in them, in the order of their first use.
    """

    def __init__(self) -> None:
        self.expressions: list[Any] = []
        self.symbols: list[Any] = []

    def place(self, shape: Sequence[Any], itemsize: int) -> int | None:
        """The place of a tensor's size; its dims are ints or int64 tvm expressions. None for one of other operators.

        Where a dim such as (h - 1) // 2 is negative there is no such tensor: it counts as 0.
        """
        import tvm_ffi

        from kbitc.targets.lower import dims

        if not all(map(_is_known, shape)):
            return None
        size = functools.reduce(lambda a, b: a * b, map(_not_negative, shape), itemsize)
        size = (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        for place, known in enumerate(self.expressions):
            if type(known) is type(size) and (known == size if isinstance(size, int) else _same(tvm_ffi, known, size)):
                return place
        self.expressions.append(size)
        for symbol in dims.variables(size):
            if not any(symbol.same_as(other) for other in self.symbols):
                self.symbols.append(symbol)
        return len(self.expressions) - 1

    def at(self, numbers: Sequence[int]) -> list[int]:
        """The sizes where the symbols are these numbers."""
        return self.over(numbers)

    def over(self, values: Sequence[Any]) -> list[Any]:
        """The sizes with ints, or int64 expressions, in the place of the symbols."""
        pairs = list(zip(self.symbols, values, strict=True))
        return [_replaced(size, pairs) for size in self.expressions]

    def at_dims(self, dims: Mapping[str, int]) -> list[int]:
        """The sizes for numbers of the symbols by name."""
        return self.at([dims[symbol.name] for symbol in self.symbols])


def _same(tvm_ffi: Any, a: Any, b: Any) -> bool:
    return bool(tvm_ffi.structural_equal(a, b))


def _replaced(expression: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
    """An expression with other values for variables. Simplifying products of open sizes takes minutes."""
    from tvm import tirx

    if isinstance(expression, int):
        return expression
    if isinstance(expression, tirx.IntImm):
        return int(expression.value)
    if isinstance(expression, tirx.Var):
        return next(value for symbol, value in pairs if symbol.same_as(expression))
    if isinstance(expression, tirx.Cast):
        return _replaced(expression.value, pairs)
    a, b = _replaced(expression.a, pairs), _replaced(expression.b, pairs)
    of_ints, name = _OPERATORS[type(expression).__name__]
    return of_ints(a, b) if not name or (isinstance(a, int) and isinstance(b, int)) else getattr(tirx, name)(a, b)


def _is_known(size: Any) -> bool:
    from tvm import tirx

    if isinstance(size, int | tirx.IntImm | tirx.Var):
        return True
    if isinstance(size, tirx.Cast):
        return _is_known(size.value)
    return type(size).__name__ in _OPERATORS and _is_known(size.a) and _is_known(size.b)


def _not_negative(dim: Any) -> Any:
    from tvm import tirx

    from kbitc.targets.lower import dims

    dim = dims.as_dim(dim)
    if isinstance(dim, int) or dims.provably(dim >= 0):
        return dim
    return tirx.max(dim, tirx.const(0, "int64"))
