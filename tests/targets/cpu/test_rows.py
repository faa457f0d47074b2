"""Softmax and normalisation of rows as one kernel, against float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from kbitc.targets.kernels import mathfn
from tests.support.groups import HERE, NEON, Scheduled

UNIT_ROUNDOFF = 2.0**-24
SHAPES = [(1, 1), (3, 7), (5, 16), (5, 40), (2, 70), (9, 129), (40, 1000)]


@pytest.fixture(params=HERE, ids=str)
def target(request: pytest.FixtureRequest) -> Any:
    return request.param


def numbers(*shape: int) -> Any:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32) * 3


def softmax(rows: Any, columns: Any, logarithm: bool) -> tuple[list[Any], Any]:
    x = te.placeholder((rows, columns), "float32")
    k, j = te.reduce_axis((0, columns), "k"), te.reduce_axis((0, columns), "j")
    peak = te.compute((rows,), lambda r: te.max(x(r, k.var), axis=k), name="row_max")
    parts = te.compute((rows, columns), lambda r, c: mathfn.exp(x(r, c) - peak(r)), name="row_exp")
    total = te.compute((rows,), lambda r: te.sum(parts(r, j.var), axis=j), name="row_sum")
    if logarithm:
        shifted = te.compute((rows, columns), lambda r, c: x(r, c) - peak(r) - mathfn.log(total(r)), name="row_result")
        return [x], shifted
    return [x], te.compute((rows, columns), lambda r, c: parts(r, c) / total(r), name="row_result")


def softmax64(x: Any) -> Any:
    wide = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return wide / wide.sum(1, keepdims=True)


def check_softmax(got: Any, x: Any) -> None:
    """Subtraction u * |x - max| becomes relative in exp; exp 2 u; sum n u; inverse and product 2 u."""
    spread = np.abs(x.astype(np.float64) - x.max(1, keepdims=True))
    spread = spread + spread.max(1, keepdims=True)
    relative = (spread + x.shape[1] + 2 + 2 + 2) * UNIT_ROUNDOFF
    assert np.all(np.abs(got - softmax64(x)) <= relative * softmax64(x))


@pytest.mark.parametrize("logarithm", [False, True])
def test_softmax_of_symbolic_shape(target: Any, logarithm: bool) -> None:
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    group = Scheduled(*softmax(n, m, logarithm), target)
    assert group.rule == "rows"
    for shape in SHAPES:
        x = numbers(*shape)
        got = group([x], (shape, "float32"))
        if logarithm:
            bound = (shape[1] + 8) * UNIT_ROUNDOFF * (1 + np.abs(np.log(softmax64(x))) + np.abs(x).max())
            assert np.all(np.abs(got - np.log(softmax64(x))) <= bound)
        else:
            check_softmax(got, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_of_known_shape(target: Any, shape: tuple[int, int]) -> None:
    x = numbers(*shape)
    check_softmax(Scheduled(*softmax(*shape, False), target)([x], (shape, "float32")), x)


def layer_norm(rows: Any, columns: Any) -> tuple[list[Any], list[Any]]:
    x, scale = te.placeholder((rows, columns), "float32"), te.placeholder((columns,), "float32")
    k, j = te.reduce_axis((0, columns), "k"), te.reduce_axis((0, columns), "j")
    count = tirx.Cast("float32", tirx.const(columns, "int64") if isinstance(columns, int) else columns)
    total = te.compute((rows,), lambda r: te.sum(x(r, k.var), axis=k), name="row_sum")
    mean = te.compute((rows,), lambda r: total(r) / count, name="row_mean")

    def square(r: Any) -> Any:
        difference = x(r, j.var) - mean(r)
        return te.sum(difference * difference, axis=j)

    squares = te.compute((rows,), square, name="row_square")
    one, epsilon = tirx.const(1.0, "float32"), tirx.const(1e-5, "float32")
    inverse = te.compute((rows,), lambda r: one / tirx.sqrt(squares(r) / count + epsilon), name="row_inverse")
    result = te.compute((rows, columns), lambda r, c: (x(r, c) - mean(r)) * inverse(r) * scale(c), name="row_result")
    return [x, scale], [result, mean, inverse]


def check_norm(got: Any, x: Any, scale: Any) -> None:
    result, mean, inverse = got
    wide, n = x.astype(np.float64), x.shape[1]
    true_mean, true_inverse = wide.mean(1), 1 / np.sqrt(wide.var(1) + 1e-5)
    mean_bound = (n + 1) * UNIT_ROUNDOFF * np.abs(wide).mean(1)
    assert np.all(np.abs(mean - true_mean) <= mean_bound)
    # The variance inherits twice the mean's error times |x - mean|, then a sum of n squares.
    shift = 2 * mean_bound[:, None] * np.abs(wide - true_mean[:, None])
    variance_bound = shift.mean(1) + mean_bound**2 + (n + 4) * UNIT_ROUNDOFF * wide.var(1)
    relative = 0.5 * variance_bound * true_inverse**2 + 4 * UNIT_ROUNDOFF
    assert np.all(np.abs(inverse - true_inverse) <= relative * true_inverse)
    centred = np.abs(wide - true_mean[:, None])
    each = (mean_bound[:, None] + UNIT_ROUNDOFF * centred + centred * (relative[:, None] + 2 * UNIT_ROUNDOFF)) * 1.01
    want = (wide - true_mean[:, None]) * true_inverse[:, None] * scale
    assert np.all(np.abs(result - want) <= each * true_inverse[:, None] * np.abs(scale) + 1e-30)


@pytest.mark.parametrize("symbolic", [False, True])
def test_layer_norm_with_its_means(target: Any, symbolic: bool) -> None:
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    made = Scheduled(*layer_norm(n, m), target) if symbolic else None
    for shape in SHAPES:
        x, scale = numbers(*shape), numbers(shape[1])
        group = made or Scheduled(*layer_norm(*shape), target)
        assert group.rule == "rows"
        check_norm(group([x, scale], (shape, "float32"), *[(shape[:1], "float32")] * 2), x, scale)


def test_results_do_not_depend_on_the_vector_length() -> None:
    x = numbers(20, 333)
    results = [Scheduled(*softmax(20, 333, False), target)([x], (x.shape, "float32")) for target in HERE]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_neon_code_is_vectors() -> None:
    text = Scheduled(*softmax(64, 128, False), NEON).assembly()
    assert "fmla\tv" in text and "fcmgt\tv" in text and "\texpf" not in text
