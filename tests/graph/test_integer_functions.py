"""Integer functions: the ONNX body, run by onnxruntime, equals the numpy meaning on all or on extreme values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from kbitc.graph import functions
from kbitc.graph import integer_functions as integer
from kbitc.graph.evaluate import evaluate
from kbitc.quant.packing import pack_dense

Array = npt.NDArray[Any]
INT32 = np.iinfo(np.int32)


def _call(name: str, *inputs: Array, **attributes: int) -> Array:
    """Run one function of the kbitc domain in onnxruntime, through a model that the full checker accepts."""
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for i, array in enumerate(inputs)
    ]
    node = ir.node(name, values, attributes=attributes, domain=functions.DOMAIN, name="call")
    node.outputs[0].name = "y"
    codes = (integer.REQUANTIZE, integer.INTEGER_ADD, integer.INTEGER_PRELU, integer.TABLE)
    kinds = {**dict.fromkeys(codes, 2), integer.INTEGER_MUL: 6}
    node.outputs[0].type = ir.TensorType(ir.DataType(kinds.get(name, 3)))
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    functions.add_functions(model, [name], 21)
    node.outputs[0].shape = ir.Shape([None] * _rank(name, inputs))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return evaluate(model, {f"x{i}": array for i, array in enumerate(inputs)})["y"]


def _rank(name: str, inputs: tuple[Array, ...]) -> int:
    if name in (integer.LEVELS, integer.BLOCK_LEVELS):
        return 3
    return max(array.ndim for array in inputs[: 1 if name == integer.REQUANTIZE else 2])


def _i32(*items: int) -> Array:
    return np.array(items, np.int32)


EXTREME = _i32(INT32.min, INT32.min + 1, -(1 << 30), -3, -2, -1, 0, 1, 2, 3, 1 << 30, INT32.max - 1, INT32.max)


@pytest.mark.parametrize("shift", [*range(1, 63)])
def test_requantize_at_every_shift(shift: int) -> None:
    for multiplier in (0, 1 << 30, (1 << 30) + 1, (1 << 31) - 1):
        arguments = (EXTREME, _i32(multiplier), _i32(shift))
        found = _call("Requantize", *arguments, np.array(128, np.int32), axis=0, low=0, high=255)
        np.testing.assert_array_equal(found, integer.requantize(*arguments, 128, axis=0, low=0, high=255))
        exact = [(Fraction(int(acc) * multiplier, 1 << shift) + Fraction(1, 2)).__floor__() for acc in EXTREME]
        np.testing.assert_array_equal(found, np.clip(np.array(exact, object) + 128, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((3, 5), 1), ((2, 5, 3, 4), 1), ((2, 3, 5), 2)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_requantize_along_an_axis(shape: tuple[int, ...], axis: int, per_channel: bool) -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-(1 << 20), 1 << 20, shape).astype(np.int32)
    size = shape[axis] if per_channel else 1
    multiplier = rng.integers(1 << 30, 1 << 31, size).astype(np.int32)
    shift = rng.integers(40, 50, size).astype(np.int32)
    found = _call("Requantize", acc, multiplier, shift, np.array(7, np.int32), axis=axis, low=7, high=15)
    np.testing.assert_array_equal(found, integer.requantize(acc, multiplier, shift, 7, axis=axis, low=7, high=15))
    assert found.min() == 7 and found.max() == 15


ALL = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("shift", [1, 2, 20, 21, 29, 30])
@pytest.mark.parametrize(("a_mult", "b_mult"), [(1 << 21, 1 << 21), (-(1 << 21), -(1 << 21)), (1234567, -765433)])
def test_integer_add_on_all_pairs(shift: int, a_mult: int, b_mult: int) -> None:
    for zeros in ((0, 0), (255, 255), (0, 255)):
        numbers = (*zeros, a_mult, b_mult, shift, 100)
        scalars = [np.array(item, np.int32) for item in numbers]
        found = _call("IntegerAdd", ALL[:, None], ALL[None, :], *scalars, low=0, high=255)
        names = ("a_zero", "b_zero", "a_mult", "b_mult", "shift", "zero")
        wanted = integer.integer_add(
            ALL[:, None], ALL[None, :], low=0, high=255, **dict(zip(names, numbers, strict=True))
        )
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shift", [1, 2, 20, 21, 29, 30])
@pytest.mark.parametrize("x_zero", [0, 117, 255])
def test_integer_prelu_on_all_codes(shift: int, x_zero: int) -> None:
    below = _i32(0, 1, -1, 1234567, -765433, 1 << 21, -(1 << 21))[:, None]
    for above in (1, 1234567, 1 << 21):
        numbers = {"x_zero": x_zero, "above": above, "shift": shift, "zero": 100}
        scalars = [np.array(item, np.int32) for item in numbers.values()]
        x = np.broadcast_to(ALL, (len(below), 256))
        found = _call("IntegerPRelu", x, below, *scalars, low=0, high=250)
        np.testing.assert_array_equal(found, integer.integer_prelu(x, below, low=0, high=250, **numbers))
        exact = [(int(code) - x_zero) * int(above if code >= x_zero else below[3, 0]) for code in ALL]
        rounded = [(Fraction(item, 1 << shift) + Fraction(1, 2)).__floor__() + 100 for item in exact]
        np.testing.assert_array_equal(found[3], np.clip(np.array(rounded, object), 0, 250).astype(np.uint8))


@pytest.mark.parametrize("zeros", [(0, 0), (255, 255), (3, 200)])
def test_integer_mul_on_all_pairs(zeros: tuple[int, int]) -> None:
    scalars = [np.array(item, np.int32) for item in zeros]
    found = _call("IntegerMul", ALL[:, None], ALL[None, :], *scalars)
    np.testing.assert_array_equal(found, integer.integer_mul(ALL[:, None], ALL[None, :], *zeros))


def test_table_on_all_codes() -> None:
    entries = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
    np.testing.assert_array_equal(_call("Table", ALL.reshape(2, 8, 16), entries), entries.reshape(2, 8, 16))


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_of_every_code(bits: int) -> None:
    rng = np.random.default_rng(bits)
    shape = (5, 3, 40)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    codes.reshape(-1)[: 1 << bits] = np.arange(1 << bits)
    grid = np.sort(rng.choice(np.arange(-8, 9) if bits < 5 else np.arange(-128, 128), 1 << bits, replace=False))
    stream, grid = pack_dense(codes, bits), grid.astype(np.int8)
    sizes = np.array(shape, np.int64)
    found = _call("LevelsKBit", stream, grid, sizes, bits=bits)
    np.testing.assert_array_equal(found, grid[codes])
    np.testing.assert_array_equal(found, integer.levels(stream, grid, shape, bits))
    if bits < 5:
        factors = rng.integers(-15, 16, (5, 3, 3)).astype(np.int8)
        found = _call("BlockLevelsKBit", stream, grid, factors, sizes, bits=bits, block=16)
        np.testing.assert_array_equal(found, integer.levels(stream, grid, shape, bits, factors, 16))
        assert found[4, 2, 39] == int(grid[codes[4, 2, 39]]) * int(factors[4, 2, 2])


def test_a_ratio_becomes_the_nearest_multiplier() -> None:
    for ratio in (2.0**28.9, 1.0, 0.5, 1 / 3, 0.1, 1e-6, 2.0**-32, 1 - 2.0**-40, 2.0**-31 * (1 - 2.0**-50)):
        multiplier, shift = integer.fixed_point(ratio)
        assert 1 << 30 <= multiplier < 1 << 31 and 1 <= shift <= integer.MAX_SHIFT
        error = abs(Fraction(multiplier, 1 << shift) - Fraction(ratio))
        assert error <= Fraction(1, 1 << (shift + 1))


def test_a_factor_of_codes_is_the_nearest_float32() -> None:
    for ratio in (2.0**28.9, 1 / 3, 0.1, 1e-6, float(np.float32(0.01)), 2.0**-31 * (1 + 2.0**-20)):
        multiplier, shift = integer.code_factor(ratio)
        assert 1 << 30 <= multiplier < 1 << 31 and 1 <= shift <= integer.MAX_SHIFT
        assert Fraction(multiplier, 1 << shift) == Fraction(float(np.float32(ratio)))


def test_a_factor_of_codes_with_many_zeros_is_meant() -> None:
    """1/2 is kept; what is only next to it takes another last bit, so that no sum is in the middle of two codes."""
    assert integer.code_factor(0.5) == (1 << 30, 31)
    assert integer.code_factor(0.0) == integer.code_factor(2.0**-32.5) == (0, 1)
    for ratio in (0.5 + 2.0**-40, 0.5 - 2.0**-40, 0.75 + 2.0**-40):
        multiplier, shift = integer.code_factor(ratio)
        assert multiplier % (1 << 8) == 1 << 7
        assert abs(Fraction(multiplier, 1 << shift) - Fraction(ratio)) < Fraction(ratio) / (1 << 22)


def test_a_ratio_that_moves_no_accumulator_is_zero() -> None:
    assert integer.fixed_point(0.0) == integer.fixed_point(2.0**-32.5) == (0, 1)


@pytest.mark.parametrize("ratio", [-1.0, 2.0**29, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="rescaling factor"):
        integer.fixed_point(ratio)
