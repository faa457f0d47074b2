"""Sizes that cover symbolic ones: polynomials without negative terms over quantities of at least 1.

A size such as 48 * n * (n // 2) becomes 24 * N^2 with N = max(n, 1): never less than the size, and grows with every N.
So one bound covers another for all sizes when it does so for each term, and sums of bounds are bounds of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import lcm, prod
from typing import Any

# Places of quantities, in order; a quantity to the power of two is there twice.
Monomial = tuple[int, ...]
Terms = Mapping[Monomial, Fraction]


@dataclass(frozen=True)
class Bound:
    """A polynomial; equal polynomials are equal objects with the same hash.

    Attributes:
        terms: (monomial, coefficient above 0) pairs, sorted.
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    @classmethod
    def of(cls, terms: Terms) -> Bound:
        """Without the terms that are not positive: what is left is no less."""
        return cls(tuple(sorted((monomial, value) for monomial, value in terms.items() if value > 0)))

    @classmethod
    def constant(cls, value: int) -> Bound:
        """A number."""
        return cls.of({(): Fraction(value)})

    @property
    def is_constant(self) -> bool:
        """Whether it is a number."""
        return all(not monomial for monomial, _ in self.terms)

    def __add__(self, other: Bound) -> Bound:
        return Bound.of(_sum((dict(self.terms), dict(other.terms))))

    def times(self, number: int) -> Bound:
        """That many times as much."""
        return Bound.of({monomial: number * value for monomial, value in self.terms})

    def at(self, quantities: Sequence[int]) -> int:
        """The least integer that is no less, for quantities of at least 1."""
        exact = sum((value * prod(quantities[i] for i in monomial) for monomial, value in self.terms), Fraction(0))
        return -(-exact.numerator // exact.denominator)

    def covers(self, other: Bound) -> bool:
        """Whether it is no less than the other for all quantities of at least 1, as each term shows."""
        return _covers(self, other)

    def expression(self, quantities: Sequence[Any]) -> Any:
        """The least integer that is no less, computed from int64 tvm expressions of the quantities."""
        from tvm import tirx

        scale = lcm(*(value.denominator for _, value in self.terms)) if self.terms else 1
        total: Any = tirx.const(0, "int64")
        for monomial, value in self.terms:
            total = total + functools.reduce(lambda a, b: a * b, [quantities[i] for i in monomial], int(value * scale))
        return total if scale == 1 else tirx.floordiv(total + (scale - 1), scale)


@functools.cache
def _covers(larger: Bound, smaller: Bound) -> bool:
    difference = _sum((dict(larger.terms), {monomial: -value for monomial, value in smaller.terms}))
    # Each quantity is 1 + e with e >= 0: no term over the e may be negative.
    shifted: dict[Monomial, Fraction] = {}
    for monomial, value in difference.items():
        for count in range(len(monomial) + 1):
            for chosen in combinations(monomial, count):
                shifted[chosen] = shifted.get(chosen, Fraction(0)) + value
    return all(value >= 0 for value in shifted.values())


def largest(bounds: Iterable[Bound], most: int) -> tuple[Bound, ...]:
    """Bounds of which at any size one is no less than all the given ones; at most so many, else one above all."""
    kept: list[Bound] = []
    for bound in bounds:
        if not any(other.covers(bound) for other in kept):
            kept = [other for other in kept if not bound.covers(other)] + [bound]
    if len(kept) <= most:
        return tuple(kept)
    terms: dict[Monomial, Fraction] = {}
    for bound in kept:
        for monomial, value in bound.terms:
            terms[monomial] = max(terms.get(monomial, Fraction(0)), value)
    return (Bound.of(terms),)


def _sum(all_terms: Iterable[Terms]) -> dict[Monomial, Fraction]:
    total: dict[Monomial, Fraction] = {}
    for terms in all_terms:
        for monomial, value in terms.items():
            total[monomial] = total.get(monomial, Fraction(0)) + value
    return total


class NoBound(Exception):
    """A size holds a quantity of which it is not known that it is not negative."""


class Quantities:
    """What the bounds of one function are made of: its symbolic dims, and what is no polynomial of them.

    Attributes:
        expressions: int64 tvm expressions, none negative, by place.
    """

    def __init__(self) -> None:
        self.expressions: list[Any] = []

    def product(self, shape: Sequence[Any]) -> Bound:
        """Of the elements of a tensor; its dims are ints or tvm expressions, none negative where it exists."""
        try:
            return self.bound(functools.reduce(lambda a, b: a * b, shape, 1))
        except NoBound:
            # (h - 1) // 2 is negative for h = 0, where there is no such tensor: each dim has a bound of its own.
            bounds = (dict(self._dim(dim).terms) for dim in shape)
            return Bound.of(functools.reduce(_product, bounds, {(): Fraction(1)}))

    def _dim(self, dim: Any) -> Bound:
        try:
            return self.bound(dim)
        except NoBound:
            return Bound.of({(self._place(dim),): Fraction(1)})

    def bound(self, size: Any) -> Bound:
        """The bound of a size, an int or a tvm expression that is not negative.

        Raises:
            NoBound: none is known.
        """
        from kbitc.targets.lower import dims

        return Bound.of(self._polynomial(dims.as_dim(size))[0])

    def at(self, number: int) -> list[int]:
        """The quantities where every symbolic dim is this number."""
        from tvm import sym, tirx

        from kbitc.targets.lower import dims

        analyzer = sym.Analyzer()
        for expression in self.expressions:
            for symbol in dims.variables(expression):
                analyzer.bind(symbol, tirx.const(number, "int64"), allow_override=True)
        return [max(1, int(analyzer.simplify(expression))) for expression in self.expressions]

    def _polynomial(self, size: Any) -> tuple[dict[Monomial, Fraction], bool]:
        """Terms of a polynomial that is no less, and whether it is equal."""
        from tvm import tirx

        from kbitc.targets.lower import dims

        if isinstance(size, int):
            return {(): Fraction(size)}, True
        if isinstance(size, tirx.IntImm):
            return {(): Fraction(int(size.value))}, True
        if isinstance(size, tirx.Add | tirx.Sub | tirx.Mul):
            (a, a_exact), (b, b_exact) = self._polynomial(size.a), self._polynomial(size.b)
            exact = a_exact and b_exact
            if isinstance(size, tirx.Add):
                return _sum((a, b)), exact
            if isinstance(size, tirx.Mul) and (exact or _positive(a, b)):
                return _product(a, b), exact
            if isinstance(size, tirx.Sub) and b_exact:
                return _sum((a, {monomial: -value for monomial, value in b.items()})), exact
        if isinstance(size, tirx.FloorDiv) and isinstance(size.b, tirx.IntImm) and int(size.b.value) > 0:
            terms, _ = self._polynomial(size.a)
            return {monomial: value / int(size.b.value) for monomial, value in terms.items()}, False
        if not isinstance(size, tirx.Var) and not dims.provably(size >= 0):
            raise NoBound
        return {(self._place(size),): Fraction(1)}, True

    def _place(self, expression: Any) -> int:
        import tvm_ffi

        for place, known in enumerate(self.expressions):
            if tvm_ffi.structural_equal(known, expression):
                return place
        self.expressions.append(expression)
        return len(self.expressions) - 1


def _positive(*factors: Terms) -> bool:
    return all(value >= 0 for terms in factors for value in terms.values())


def _product(a: Terms, b: Terms) -> dict[Monomial, Fraction]:
    return _sum({tuple(sorted(m + n)): v * w} for m, v in a.items() for n, w in b.items())
