"""Softmax, normalizations, sums, quotients and roots on integers give what onnxruntime makes of their bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc.graph import integer_nonlinear as nonlinear
from kbitc.graph.evaluate import evaluate
from kbitc.targets.target import parse_target
from tests.support.integer_graphs import Graph
from tests.support.lowered import Runnable, run_of

Array = npt.NDArray[Any]
Make = Callable[[Graph, ir.Value], ir.Value]
RANDOM = np.random.default_rng(0)


def i32(*items: int) -> Array:
    return np.array(items, np.int32)


def scalar(value: int, kind: type = np.int32) -> Array:
    return np.array(value, kind)


def softmax(multiplier: int, shift: int, axis: int) -> Make:
    numbers = scalar(multiplier), scalar(shift), nonlinear.powers()
    return lambda g, x: g.node("IntegerSoftmax", x, *numbers, axis=axis)


def norm(channels: int, epsilon: int, shift: int) -> Make:
    gain = RANDOM.integers(-(2**31), 2**31, channels).astype(np.int32)
    bias = RANDOM.integers(-(2**20), 2**20, channels).astype(np.int32)
    rest = scalar(epsilon, np.int64), scalar(shift)
    return lambda g, x: g.node("IntegerLayerNorm", x, gain, bias, *rest)


def rescaled(multiplier: Array, shift: Array, axis: int) -> Make:
    return lambda g, x: g.node("Rescale", x, multiplier, shift, axis=axis, low=-30000, high=2**29)


def rms(channels: int, epsilon: int, shift: int) -> Make:
    gain = RANDOM.integers(-(2**31), 2**31, channels).astype(np.int32)
    return lambda g, x: g.node("IntegerRMSNorm", x, gain, scalar(epsilon, np.int64), scalar(shift))


def exp(peak: int, multiplier: int, shift: int) -> Make:
    numbers = scalar(peak), scalar(multiplier), scalar(shift), nonlinear.powers()
    return lambda g, x: g.node("IntegerExp", x, *numbers)


def wide(*numbers: int) -> list[Array]:
    return [scalar(number, np.int64) for number in numbers]


def summed(axes: Array, factor: int, divisor: int, limit: int, keepdims: int) -> Make:
    return lambda g, x: g.node("IntegerSum", x, axes, *wide(factor, divisor, limit), keepdims=keepdims)


def divided(divisors: Array, factor: int, divisor: int, limit: int) -> Make:
    return lambda g, x: g.node("IntegerQuotient", x, divisors, *wide(factor, divisor, limit))


def rooted(axes: Array, factor: int, keepdims: int) -> Make:
    return lambda g, x: g.node("IntegerReduceL2", x, axes, *wide(factor), keepdims=keepdims)


def root(factor: int) -> Make:
    return lambda g, x: g.node("IntegerSqrt", x, *wide(factor))


def build(make: Make, shape: tuple[int | str, ...], target: str) -> tuple[ir.Model, Runnable]:
    graph = Graph()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(shape))
    model = graph.finish(x, [make(graph, x)])
    return model, run_of(model, parse_target(target))


CASES: dict[str, tuple[Make, Array]] = {
    "softmax": (softmax(1518500250, 34, 2), RANDOM.integers(-40000, 40000, (2, 3, 37)).astype(np.int32)),
    "softmax of another axis": (softmax(1 << 30, 30, 1), RANDOM.integers(-3000, 3000, (2, 5, 3)).astype(np.int32)),
    "softmax of extremes": (softmax(2**31 - 1, 30, 1),
                            np.array([[-(2**31), 2**31 - 1, 0, 5], [3] * 4, [-1, 0, 1, 2]], np.int32)),
    "norm": (norm(70, 50, 32), RANDOM.integers(-100000, 100000, (2, 3, 70)).astype(np.int32)),
    "norm of extremes": (norm(7, 1, 40),
                         np.array([[0] * 7, [2**17] * 7, [-(2**17), 2**17] * 3 + [0], [1] + [0] * 6], np.int32)),
    "norm of one channel": (norm(1, 1, 1), np.array([[5], [-(2**17)]], np.int32)),
    "rescale": (rescaled(RANDOM.integers(2**30, 2**31, 70).astype(np.int32), np.full(70, 33, np.int32), 1),
                RANDOM.integers(-(2**31), 2**31, (9, 70)).astype(np.int32)),
    "rescale all alike": (rescaled(i32(2**31 - 1), i32(1), 0), i32(-(2**31), -1, 0, 1, 2**31 - 1)),
    "rms": (rms(70, 50, 32), RANDOM.integers(-100000, 100000, (2, 3, 70)).astype(np.int32)),
    "rms of extremes": (rms(7, 1, 40),
                        np.array([[0] * 7, [2**17] * 7, [-(2**17), 2**17] * 3 + [0], [1] + [0] * 6], np.int32)),
    "exp": (exp(5000, 1 << 30, 36), np.array([[-(2**31), -9, 0, 4999, 5000, 5001, 2**31 - 1]], np.int32)),
    "sum": (summed(np.array([1]), 1, 1, 1 << 29, 0), RANDOM.integers(-(2**31), 2**31, (2, 5, 7)).astype(np.int32)),
    "mean": (summed(np.array([1, 2]), 1 << 14, 35, 1 << 29, 1), RANDOM.integers(-255, 256, (2, 5, 7)).astype(np.int32)),
    "quotient": (divided(np.array([[-7], [0], [1], [999]], np.int32), 1 << 30, 3, 2**31 - 1),
                 np.array([[-(2**31), -5, -1, 0, 1, 5, 2**31 - 1]], np.int32)),
    "quotient by large": (divided(np.array([2**31 - 1], np.int32), 1, 1 << 30, 100),
                          np.array([-(2**31), -1, 0, 2**31 - 1], np.int32)),
    "length": (rooted(np.array([2]), 1 << 8, 1), RANDOM.integers(-(2**17), 2**17 + 1, (2, 3, 70)).astype(np.int32)),
    "length of nothing": (rooted(np.array([1]), 1, 0), np.zeros((2, 3), np.int32)),
    "length over two axes": (rooted(np.array([0, 2]), 1 << 12, 0), RANDOM.integers(-9, 9, (2, 3, 7)).astype(np.int32)),
    "root": (root(1 << 28), np.array([-(2**31), -1, 0, 1, 2, 3, 4, 2**31 - 1], np.int32)),
}  # fmt: skip


@pytest.mark.parametrize("target", ["x86:avx512vnni", "x86:avx2", "reference"])
def test_equal_to_onnxruntime(target: str) -> None:
    for name, (make, x) in CASES.items():
        model, run = build(make, x.shape, target)
        wanted = evaluate(model, {"x": x})
        for array, found in zip(wanted.values(), run({"x": x}), strict=True):
            np.testing.assert_array_equal(found, array, err_msg=name)


def test_symbolic_rows_and_columns() -> None:
    make, _ = CASES["softmax"]
    model, run = build(make, ("batch", 3, "length"), "x86:avx512vnni")
    for shape in ((1, 3, 1), (2, 3, 19)):
        x = RANDOM.integers(-9000, 9000, shape).astype(np.int32)
        np.testing.assert_array_equal(run({"x": x})[0], *evaluate(model, {"x": x}).values())


def test_a_multiplier_that_is_computed_is_refused() -> None:
    from kbitc.errors import UnsupportedError

    def make(g: Graph, x: ir.Value) -> ir.Value:
        return g.node("Rescale", x, x, i32(33), axis=0, low=0, high=1)

    with pytest.raises(UnsupportedError, match="constant"):
        build(make, (4,), "reference")
