"""Sizes of tensors: exact for every dim, multiples of the alignment, each once."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest
from tvm import sym, tirx

from kbitc.targets.memory.sizes import ALIGNMENT, Sizes

N, M = tirx.Var("n", "int64"), tirx.Var("m", "int64")
HALF = tirx.floordiv(N + 1, 2)
SHAPES = {
    "numbers": [3, 5],
    "plain": [N, 4, M],
    "halves": [HALF, 64, tirx.floordiv(HALF + 1, 2)],
    "negative for small dims": [1, tirx.floordiv(N - 1, 2), tirx.floordiv(M - 1, 2), 12],
    "as C divides": [tirx.truncdiv(N - 5, 2), tirx.truncmod(M - 5, 3), tirx.truncdiv(N - 5, 2) + 3, 2],
    "ends": [tirx.min(M - 5, N - 3), tirx.max(N, M * 2), tirx.floormod(N, 3)],
}


def value(expression: Any, n: int, m: int) -> int:
    analyzer = sym.Analyzer()
    for var, number in ((N, n), (M, m)):
        analyzer.bind(var, tirx.const(number, "int64"))
    return int(analyzer.simplify(expression)) if not isinstance(expression, int) else expression


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_size_is_the_bytes_rounded_up(shape: list[Any]) -> None:
    sizes = Sizes()
    place = sizes.place(shape, 4)
    for n, m in product((0, 1, 2, 7, 64), repeat=2):
        wanted = 4 * prod(max(0, value(dim, n, m)) for dim in shape)
        dims = {"n": n, "m": m}
        assert sizes.at_dims(dims)[place] == -(-wanted // ALIGNMENT) * ALIGNMENT
        numbers = [tirx.const(dims[symbol.name], "int64") for symbol in sizes.symbols]
        assert value(sizes.over(numbers)[place], n, m) == sizes.at_dims(dims)[place]


def test_other_operators_have_no_place() -> None:
    assert Sizes().place([4, tirx.Select(N > M, N, M)], 4) is None


def test_equal_sizes_have_one_place() -> None:
    sizes = Sizes()
    assert sizes.place([N, 16], 4) == sizes.place([N, 16], 4) == 0
    assert sizes.place([N, 8], 4) == 1
    assert sizes.place([3, 5], 4) == sizes.place([15], 4) == 2
    assert [symbol.name for symbol in sizes.symbols] == ["n"]
