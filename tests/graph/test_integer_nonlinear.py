"""Integer softmax and layer normalization: the ONNX bodies equal the numpy meaning, which is near the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from kbitc.graph import functions
from kbitc.graph import integer_nonlinear as integer
from kbitc.graph.evaluate import evaluate
from kbitc.graph.integer_functions import fixed_point

Array = npt.NDArray[Any]


def call(name: str, dtype: ir.DataType, *inputs: Array, **attributes: int) -> Array:
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for i, array in enumerate(inputs)
    ]
    node = ir.node(name, values, attributes=attributes, domain=functions.DOMAIN, name="call")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    rank = inputs[0].ndim if attributes.get("keepdims", 1) else inputs[0].ndim - inputs[1].size
    node.outputs[0].shape = ir.Shape([None] * rank)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    functions.add_functions(model, [name], 21)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return evaluate(model, {f"x{i}": array for i, array in enumerate(inputs)})["y"]


def scalar(number: int) -> Array:
    return np.array(number, np.int32)


@pytest.mark.parametrize("shift", [1, 31, 32, 40, 62])
def test_rescale(shift: int) -> None:
    ends = np.iinfo(np.int32)
    acc = np.array([[ends.min, -(1 << 30), -5, -1, 0, 1, 5, 1 << 30, ends.max]] * 2, np.int32)
    for multiplier in (np.array([(1 << 31) - 1], np.int32), np.array([1 << 30, (1 << 31) - 1], np.int32)):
        arguments = (acc, multiplier, np.full(multiplier.shape, shift, np.int32))
        for limit in (1 << 17, (1 << 31) - 1):
            found = call("Rescale", ir.DataType.INT32, *arguments, axis=0, low=-limit, high=limit)
            np.testing.assert_array_equal(found, integer.rescale(*arguments, axis=0, low=-limit, high=limit))


@pytest.mark.parametrize("scale", [2.0**-10, 0.1, 3e-5, 20.0])
@pytest.mark.parametrize("axis", [1, 2])
def test_softmax(scale: float, axis: int) -> None:
    rng = np.random.default_rng(0)
    x = np.rint(rng.normal(size=(3, 40, 17)) * 4 / scale).astype(np.int32)
    x[0, 0] = np.iinfo(np.int32).min // 2
    x[1] = x[1, 0, 0]
    multiplier, shift = fixed_point(scale * np.log2(np.e) * 256)
    found = call("IntegerSoftmax", ir.DataType.UINT8, x, scalar(multiplier), scalar(shift), integer.powers(), axis=axis)
    np.testing.assert_array_equal(found, integer.softmax(x, multiplier, shift, axis))
    real = np.exp(scale * (x.astype(np.float64) - x.max(axis=axis, keepdims=True)))
    real /= real.sum(axis=axis, keepdims=True)
    # Exponents are rounded to 1/256 of an octave: a share is off by at most the factor 2^(1/256).
    assert np.abs(found - 255 * real).max() <= 0.5 + 255 * (2 ** (1 / 256) - 1)


@pytest.mark.parametrize("channels", [1, 2, 7, 384, 4096])
def test_layer_norm(channels: int) -> None:
    rng = np.random.default_rng(channels)
    limit = 1 << integer.NORM_BITS
    rows = [
        np.zeros(channels), np.full(channels, limit), np.full(channels, -limit), rng.integers(-1, 2, channels),
        rng.integers(-limit, limit + 1, channels), rng.normal(size=channels) * 500 + 9000,
        np.where(np.arange(channels) == 0, limit, -limit),
    ]  # fmt: skip
    x = np.stack(rows).astype(np.int32)
    gain, bias = rng.integers(-(1 << 31) + 1, 1 << 31, channels), rng.integers(-(1 << 20), 1 << 20, channels)
    for epsilon, shift in ((1, 31), (1 << 20, 40)):
        arguments = (x, gain.astype(np.int32), bias.astype(np.int32))
        found = call("IntegerLayerNorm", ir.DataType.INT32, *arguments, np.array(epsilon), scalar(shift))
        np.testing.assert_array_equal(found, integer.layer_norm(*arguments, epsilon, shift))


def test_layer_norm_is_near_the_real_one() -> None:
    x = np.rint(np.random.default_rng(1).normal(size=(5, 384)) * 3000 + 100).astype(np.int32)
    gain = np.full(384, 1 << 30, np.int32)
    found = integer.layer_norm(x, gain, np.zeros(384, np.int32), 1, 30 + integer.RATIO_BITS - 10) / 1024
    real = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    # Half a unit of the mean and of the result; the root is rounded down to 1/128 of a unit.
    assert np.abs(found - real).max() <= 0.5 / 3000 * 1.1 + 1 / 1024 + 4.0 / 128 / 2900


def test_square_roots_are_exact() -> None:
    roots = np.array([1, 2, 3, 1 << 15, (1 << 30) - 1, 1 << 30], np.int64)
    for offset in (-1, 0, 1):
        numbers = roots * roots + offset
        wanted = roots - (offset < 0)
        np.testing.assert_array_equal(integer.square_root(np.maximum(numbers, 0)), wanted)
