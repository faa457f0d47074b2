"""Reductions against float64 numpy, with the bound of a sum of n rounded additions, and in their stated order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from kbitc.targets.kernels import mathfn
from tests.support.groups import HERE, NEON, Scheduled

UNIT_ROUNDOFF = 2.0**-24
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 17), (4, 63), (4, 64), (6, 129), (33, 200)]


def numbers(*shape: int) -> Any:
    return np.random.default_rng(6).normal(size=shape).astype(np.float32)


def axis_of(extent: Any, name: str = "k") -> Any:
    return te.reduce_axis((0, extent), name)


@pytest.fixture(params=HERE, ids=str)
def target(request: pytest.FixtureRequest) -> Any:
    return request.param


def close_sum(got: Any, x: Any, axis: Any) -> None:
    """n - 1 additions, each with a relative error of u: n * u * sum of absolute values (Higham, section 4.2)."""
    wide = x.astype(np.float64)
    terms = x.size // max(1, got.size)
    bound = terms * UNIT_ROUNDOFF * np.abs(wide).sum(axis=axis)
    assert np.all(np.abs(got - wide.sum(axis=axis)) <= bound)


def stated_order(line: Any, chains: int) -> np.float32:
    """The order of `partial_sums` in numpy."""
    sums = np.zeros((chains, 16), np.float32)
    for c, value in enumerate(line):
        vector = c // 16
        whole = vector < line.size // 16
        sums[vector % chains if whole else chains - 1, c % 16] += value
    total = sums[0] if chains == 1 else (sums[0] + sums[1]) + (sums[2] + sums[3])
    for half in (8, 4, 2, 1):
        total = total[:half] + total[half:]
    return np.float32(total[0])


def test_sum_along_rows_of_symbolic_shape(target: Any) -> None:
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    a, k = te.placeholder((n, m), "float32"), axis_of(m)
    total = Scheduled([a], te.compute((n,), lambda i: te.sum(a(i, k.var), axis=k)), target)
    assert total.rule == "reduction"
    for shape in SHAPES:
        x = numbers(*shape)
        got = total([x], (shape[:1], "float32"))
        close_sum(got, x, 1)
        assert np.array_equal(got, [stated_order(line, 4) for line in x]), shape


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_along_rows_of_known_shape(target: Any, shape: tuple[int, int]) -> None:
    a, k = te.placeholder(shape, "float32"), axis_of(shape[1])
    x = numbers(*shape)
    got = Scheduled([a], te.compute(shape[:1], lambda i: te.sum(a(i, k.var), axis=k)), target)(
        [x], (shape[:1], "float32")
    )
    assert np.array_equal(got, [stated_order(line, 4 if shape[1] >= 64 else 1) for line in x])


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_along_and_sum_across(target: Any, shape: tuple[int, int]) -> None:
    a, k, r = te.placeholder(shape, "float32"), axis_of(shape[1]), axis_of(shape[0])
    x = numbers(*shape)
    largest = Scheduled([a], te.compute(shape[:1], lambda i: te.max(a(i, k.var), axis=k)), target)
    assert np.array_equal(largest([x], (shape[:1], "float32")), x.max(1))
    across = Scheduled([a], te.compute(shape[1:], lambda j: te.sum(a(r.var, j), axis=r)), target)
    want = np.zeros(shape[1], np.float32)
    for line in x:
        want = want + line  # one after the other
    assert np.array_equal(across([x], (shape[1:], "float32")), want)


def test_sum_across_of_symbolic_shape(target: Any) -> None:
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    a, k = te.placeholder((n, m), "float32"), axis_of(n)
    total = Scheduled([a], te.compute((m,), lambda j: te.sum(a(k.var, j), axis=k)), target)
    for shape in SHAPES:
        x = numbers(*shape)
        close_sum(total([x], (shape[1:], "float32")), x, 0)


def test_max_pool_with_a_border(target: Any) -> None:
    x = numbers(2, 13, 11, 40)
    a, kh, kw = te.placeholder(x.shape, "float32"), axis_of(3, "kh"), axis_of(3, "kw")

    def element(b: Any, h: Any, w: Any, c: Any) -> Any:
        y, z = h * 2 + kh.var - 1, w * 2 + kw.var - 1
        inside = tirx.all(y >= 0, y < 13, z >= 0, z < 11)
        return te.max(tirx.if_then_else(inside, a(b, y, z, c), te.min_value("float32")), axis=[kh, kw])

    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    want = np.max([padded[:, i : i + 13 : 2, j : j + 11 : 2] for i in range(3) for j in range(3)], axis=0)
    assert np.array_equal(Scheduled([a], te.compute(want.shape, element), target)([x], (want.shape, "float32")), want)


@pytest.mark.parametrize("axes", [(1, 2), (0, 3), (0, 1, 2, 3), (3,), (0,), (1,)])
def test_several_axes(target: Any, axes: tuple[int, ...]) -> None:
    x = numbers(3, 5, 14, 14)
    a = te.placeholder(x.shape, "float32")
    loops = {axis: axis_of(x.shape[axis], f"k{axis}") for axis in axes}
    kept = [axis for axis in range(4) if axis not in axes]

    def element(*indices: Any) -> Any:
        own = [loops[axis].var if axis in axes else indices[kept.index(axis)] for axis in range(4)]
        return te.sum(a(*own), axis=list(loops.values()))

    shape = tuple(x.shape[axis] for axis in kept)
    got = Scheduled([a], te.compute(shape, element), target)([x], (shape, "float32"))
    close_sum(got, x, axes)


def test_integers_and_functions_inside(target: Any) -> None:
    x = (numbers(4, 70) * 1000).astype(np.int64)
    a, k = te.placeholder(x.shape, "int64"), axis_of(70)
    got = Scheduled([a], te.compute((4,), lambda i: te.sum(a(i, k.var), axis=k)), target)([x], ((4,), "int64"))
    assert np.array_equal(got, x.sum(1))
    y = numbers(4, 70)
    b, j = te.placeholder(y.shape, "float32"), axis_of(70)
    exponentials = te.compute((4,), lambda i: te.sum(mathfn.exp(b(i, j.var)), axis=j))
    got = Scheduled([b], exponentials, target)([y], ((4,), "float32"))
    want = np.exp(y.astype(np.float64)).sum(1)
    # exp is right to 1 ulp = 2 units of roundoff.
    assert np.all(np.abs(got - want) <= (70 + 2) * UNIT_ROUNDOFF * want)


def test_what_no_rule_knows_runs_as_plain_loops(target: Any) -> None:
    x = numbers(6, 9)
    a, k = te.placeholder(x.shape, "float32"), axis_of(9)

    def join(p: Any, q: Any) -> Any:
        keep = tirx.Or(q[0] < 0, tirx.And(p[0] >= 0, p[1] >= q[1]))
        return tirx.Select(keep, p[0], q[0]), tirx.Select(keep, p[1], q[1])

    reducer = te.comm_reducer(join, lambda s, t: (tirx.const(-1, s), tirx.const(0, t)), name="arg")
    where, _ = te.compute((6,), lambda i: reducer((tirx.Cast("int64", k.var), a(i, k.var)), axis=k), name="best")
    group = Scheduled([a], te.compute((6,), lambda i: where(i), name="index"), target)
    assert group.rule == "plain_loops"
    assert np.array_equal(group([x], ((6,), "int64")), x.argmax(1))


def test_neon_adds_vectors() -> None:
    a, k = te.placeholder((64, 256), "float32"), axis_of(256)
    text = Scheduled([a], te.compute((64,), lambda i: te.sum(a(i, k.var), axis=k)), NEON).assembly()
    assert "fadd\tv" in text and ".4s" in text
