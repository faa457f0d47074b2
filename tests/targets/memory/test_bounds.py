"""Bounds of symbolic sizes: never below the size, and the comparison of two holds for all dims."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
from tvm import sym, tirx

from kbitc.targets.memory.bounds import Bound, NoBound, Quantities, largest

N, M = tirx.Var("n", "int64"), tirx.Var("m", "int64")
HALF = tirx.floordiv(N + 1, 2)
SIZES = {
    "number": 4,
    "polynomial": N * 4 * M + N * N * 12,
    "difference": N * 8 - M + M * 3,
    "halves": HALF * 64 * tirx.floordiv(HALF + 1, 2),
    "opaque": tirx.max(N - 3, tirx.const(0, "int64")) * M,
    "quotient of dims": tirx.floordiv(N * 6, M + 1) + 2,
}


def value(expression: Any, n: int, m: int) -> int:
    analyzer = sym.Analyzer()
    for var, number in ((N, n), (M, m)):
        analyzer.bind(var, tirx.const(number, "int64"))
    return int(analyzer.simplify(expression)) if not isinstance(expression, int) else expression


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_bound_is_never_below_the_size(size: Any) -> None:
    quantities = Quantities()
    bound = quantities.bound(size)
    for n, m in product((0, 1, 2, 7, 64), repeat=2):
        numbers = [max(1, value(expression, n, m)) for expression in quantities.expressions]
        assert bound.at(numbers) >= value(size, n, m)
        wanted = bound.expression([tirx.const(number, "int64") for number in numbers])
        assert value(wanted, n, m) == bound.at(numbers)


def test_the_bound_of_a_polynomial_is_the_size() -> None:
    quantities = Quantities()
    bound = quantities.bound(SIZES["polynomial"])
    assert bound.at([value(e, 5, 3) for e in quantities.expressions]) == value(SIZES["polynomial"], 5, 3)


def test_what_may_be_negative_has_no_bound() -> None:
    with pytest.raises(NoBound):
        Quantities().bound(N * tirx.min(M - 5, N - 9))


SHAPES = {
    "halves": [1, tirx.floordiv(N - 1, 2), tirx.floordiv(M - 1, 2), 12],
    "opaque": [tirx.min(M - 5, N - 3), tirx.floordiv(N - 1, 2)],
    "exact": [N, 4, M],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bound_of_a_tensor_holds_where_it_exists(shape: list[Any]) -> None:
    quantities = Quantities()
    bound = quantities.product(shape)
    for n, m in product((1, 2, 7, 64), repeat=2):
        sizes = [value(dim, n, m) for dim in shape]
        numbers = [max(1, value(expression, n, m)) for expression in quantities.expressions]
        assert min(sizes) < 0 or bound.at(numbers) >= prod(sizes)


def test_one_bound_covers_another_only_where_it_does_for_all_dims() -> None:
    quantities = Quantities()
    square, line, more = (quantities.bound(size) for size in (N * N, N * 4, N * M * 4))
    assert more.covers(line) and not line.covers(more)
    assert not square.covers(line) and not line.covers(square)
    assert line.covers(line) and line.covers(Bound.constant(4)) and not line.covers(Bound.constant(5))


def test_the_largest_of_many_is_one_above_all() -> None:
    quantities = Quantities()
    bounds = [quantities.bound(N * (9 - i) + M * i) for i in range(9)]
    assert set(largest([*bounds, bounds[0]], 9)) == set(bounds)
    (one,) = largest(bounds, 3)
    assert all(one.covers(bound) for bound in bounds)
