"""Integer sums, quotients, roots and exp: the ONNX bodies equal the numpy meaning, which is within its bound of the
real one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc.graph import functions
from kbitc.graph import integer_nonlinear as nonlinear
from kbitc.graph import integer_reduce as integer
from kbitc.graph.evaluate import evaluate
from kbitc.graph.integer_functions import fixed_point
from tests.graph.test_integer_nonlinear import Array, call, scalar

I32 = ir.DataType.INT32
ENDS = np.iinfo(np.int32)
RANDOM = np.random.default_rng(0)


def wide(*numbers: int) -> list[Array]:
    return [np.array(number, np.int64) for number in numbers]


def integers(low: int, high: int, *shape: int) -> npt.NDArray[np.int32]:
    return RANDOM.integers(low, high, shape).astype(np.int32)


@pytest.mark.parametrize(("factor", "divisor"), [(1, 1), (1 << 14, 35), (3, 7)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_and_means(factor: int, divisor: int, keepdims: int) -> None:
    x = integers(-(1 << 16), 1 << 16, 3, 5, 7)
    found = call("IntegerSum", I32, x, np.array([1, 2]), *wide(factor, divisor, 1 << 30), keepdims=keepdims)
    wanted = integer.integer_sum(x, (1, 2), factor, divisor, 1 << 30, keepdims=bool(keepdims))
    np.testing.assert_array_equal(found, wanted)
    real = x.astype(np.float64).sum((1, 2), keepdims=bool(keepdims)) * factor / divisor
    assert np.abs(wanted - np.clip(real, -(1 << 30), 1 << 30)).max() <= 0.5


def test_a_sum_beyond_int32_is_limited() -> None:
    x = np.array([[ENDS.max] * 9, [ENDS.min] * 9], np.int32)
    found = call("IntegerSum", I32, x, np.array([1]), *wide(1, 1, 1 << 29), keepdims=0)
    np.testing.assert_array_equal(found, [1 << 29, -(1 << 29)])


@pytest.mark.parametrize(("factor", "divisor"), [(1, 1), (1 << 30, 1), (1, 1 << 30), (1 << 12, 1)])
def test_quotients(factor: int, divisor: int) -> None:
    a = np.concatenate([integers(ENDS.min, ENDS.max, 40), np.array([ENDS.min, -1, 0, 1, ENDS.max], np.int32)])[None]
    b = np.array([1, 2, 3, 100, 65537, ENDS.max], np.int32)[:, None]
    limit = ENDS.max
    found = call("IntegerQuotient", I32, a, b, *wide(factor, divisor, limit))
    np.testing.assert_array_equal(found, integer.quotient(a, b, factor, divisor, limit))
    real = np.clip(a.astype(np.float64) * factor / (b.astype(np.float64) * divisor), -limit, limit)
    assert np.abs(found - real).max() <= 0.5


def test_a_divisor_under_one_step_is_one_step() -> None:
    b = np.array([ENDS.min, -1, 0, 1], np.int32)
    np.testing.assert_array_equal(call("IntegerQuotient", I32, np.full(4, 5, np.int32), b, *wide(2, 1, 99)), [10] * 4)


@pytest.mark.parametrize("factor", [1, 1 << 8])
def test_lengths_are_the_nearest_integers(factor: int) -> None:
    limit = 1 << nonlinear.NORM_BITS
    x = np.concatenate([integers(-limit, limit + 1, 5, 300), integers(-3, 4, 5, 300), np.zeros((1, 300), np.int32)])
    found = call("IntegerReduceL2", I32, x, np.array([1]), *wide(factor), keepdims=1)
    np.testing.assert_array_equal(found, integer.norm2(x, (1,), factor))
    energy = [factor * sum(int(item) ** 2 for item in row) for row in x]
    for number, root in zip(energy, found.reshape(-1).tolist(), strict=True):
        assert root * root - root < number <= root * root + root or number == root == 0


@pytest.mark.parametrize("factor", [1, 1 << 28])
def test_roots_are_the_nearest_integers(factor: int) -> None:
    x = np.concatenate([integers(0, ENDS.max, 200), np.array([ENDS.min, -1, 0, 1, 2, 3, ENDS.max], np.int32)])
    found = call("IntegerSqrt", I32, x, *wide(factor))
    np.testing.assert_array_equal(found, integer.sqrt(x, factor))
    for number, root in zip(x.tolist(), found.tolist(), strict=True):
        scaled = max(number, 0) * factor
        assert root * root - root < scaled <= root * root + root or scaled == root == 0


@pytest.mark.parametrize("scale", [2.0**-10, 0.3])
def test_exp(scale: float) -> None:
    x = np.concatenate([integers(-20000, 20000, 300), np.array([ENDS.min, ENDS.max], np.int32)])
    peak = 15000
    multiplier, shift = fixed_point(scale * np.log2(np.e) * 256)
    arguments = (peak, multiplier, shift)
    found = call("IntegerExp", I32, x, *(scalar(number) for number in arguments), nonlinear.powers())
    np.testing.assert_array_equal(found, nonlinear.exp(x, *arguments))
    real = 2.0**24 * np.exp(np.minimum(x.astype(np.float64) - peak, 0) * scale)
    # The exponent is half of 1/256 of an octave off, and as much by the multiplier's 31 bits at 2^31 steps at most;
    # half a unit of the table, one of the shift.
    assert (np.abs(found - real) <= real * (2 ** (1 / 512 + 1e-6) - 1) + 1.5).all()


@pytest.mark.parametrize("channels", [1, 7, 384, 4096])
def test_root_mean_square(channels: int) -> None:
    limit = 1 << nonlinear.NORM_BITS
    x = np.stack([np.zeros(channels), np.full(channels, -limit), RANDOM.integers(-limit, limit + 1, channels)])
    x = x.astype(np.int32)
    gain = RANDOM.integers(-(1 << 31) + 1, 1 << 31, channels).astype(np.int32)
    for epsilon, shift in ((1, 31), (1 << 20, 40)):
        found = call("IntegerRMSNorm", I32, x, gain, np.array(epsilon), scalar(shift))
        np.testing.assert_array_equal(found, nonlinear.rms_norm(x, gain, epsilon, shift))


def test_root_mean_square_is_near_the_real_one() -> None:
    x = np.rint(RANDOM.normal(size=(5, 384)) * 3000 + 100).astype(np.int32)
    found = nonlinear.rms_norm(x, np.full(384, 1 << 30, np.int32), 1, 30 + nonlinear.RATIO_BITS - 10) / 1024
    root = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))
    # The root is rounded down to 1/128 of a unit, the ratio to 2^-15, the result to 2^-10, both to nearest.
    bound = np.abs(x / root).max() / 128 / root.min() + 0.5 / 1024 + 0.5 / (1 << nonlinear.RATIO_BITS)
    assert np.abs(found - x / root).max() <= bound


def test_inlined_bodies_give_the_same() -> None:
    x = integers(-100, 100, 2, 9)
    value = ir.Value(name="x", type=ir.TensorType(I32), shape=ir.Shape(["n", 9]))
    from tests.support.integer_graphs import Graph

    graph = Graph()
    model = graph.finish(value, [graph.node("IntegerReduceL2", value, np.array([1]), *wide(4), keepdims=1)])
    wanted = evaluate(model, {"x": x})
    inlined = functions.inline_plain(model.clone())
    assert not [node for node in inlined.graph if node.domain or node.op_type == "Constant"]
    for name, array in evaluate(inlined, {"x": x}).items():
        np.testing.assert_array_equal(array, wanted[name])
