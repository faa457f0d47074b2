"""Groups without reduction against numpy: copies exactly, arithmetic to the last bit of one operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm_ffi
from tvm import te, tirx

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.access import pieces
from kbitc.targets.cpu.rules.stages import Axis
from kbitc.targets.kernels import mathfn
from kbitc.targets.lower import dims
from tests.support.groups import HERE, NEON, Scheduled

AXIS = tirx.Var("j", "int64")
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 17), (4, 40), (33, 50), (1, 8192), (70, 513)]


def numbers(*shape: int) -> Any:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.fixture(params=HERE, ids=str)
def target(request: pytest.FixtureRequest) -> Any:
    return request.param


def symbols(*names: str) -> list[Any]:
    return [tirx.Var(name, "int64") for name in names]


def test_broadcast_of_symbolic_shapes(target: Any) -> None:
    n, m = symbols("n", "m")
    a, b = te.placeholder((n, m), "float32"), te.placeholder((m,), "float32")
    add = Scheduled([a, b], te.compute((n, m), lambda i, j: a(i, j) + b(j)), target)
    assert add.rule == "elementwise"
    for shape in SHAPES:
        x, y = numbers(*shape), numbers(shape[1])
        assert np.array_equal(add([x, y], (shape, "float32")), x + y), shape


@pytest.mark.parametrize("shape", SHAPES)
def test_every_static_length_is_written_once_and_whole(target: Any, shape: tuple[int, int]) -> None:
    a = te.placeholder(shape, "float32")
    x = numbers(*shape)
    double = Scheduled([a], te.compute(shape, lambda i, j: a(i, j) + a(i, j)), target)
    assert np.array_equal(double([x], (shape, "float32")), x + x)


def test_a_scalar_that_is_read_beside_a_transposed_array(target: Any) -> None:
    (n,) = symbols("n")
    a, scale = te.placeholder((20, n), "float32"), te.placeholder((), "float32")
    product = Scheduled([a, scale], te.compute((n, 20), lambda i, j: scale() * a(j, i)), target)
    for count in (1, 7, 33):
        x = numbers(20, count)
        found = product([x, np.float32(0.3)], ((count, 20), "float32"))
        assert np.array_equal(found, x.T * np.float32(0.3)), count


def test_large_sizes_are_computed_once_and_named(target: Any) -> None:
    """An index that divides by sums of open heights and widths occupies TVM's simplifier for minutes."""
    n, h, w = symbols("n", "h", "w")
    cells = [((h - 1) // side * 4 + 4) * ((w - 1) // side * 4 + 4) for side in (8, 16, 32)]
    total = cells[0] + cells[1] + cells[2]
    a = te.placeholder((n, 20, total), "float32")
    like = te.placeholder((n, h, w), "float32")
    group = Scheduled([a, like], te.compute((n, total, 20), lambda b, i, j: a(b, j, i)), target)
    quotients = [line for line in str(group.function.body).splitlines() if "// T.int64(32)" in line]
    assert all(line.startswith("sizes[") or " = T.Buffer(" in line for line in quotients)
    for height, width in ((8, 8), (33, 70)):
        count = sum(((height - 1) // s * 4 + 4) * ((width - 1) // s * 4 + 4) for s in (8, 16, 32))
        x = numbers(2, 20, count)
        found = group([x, numbers(2, height, width)], ((2, count, 20), "float32"))
        assert np.array_equal(found, x.transpose(0, 2, 1))


def test_joined_axes_of_symbolic_length(target: Any) -> None:
    (n,) = symbols("n")
    a = te.placeholder((n, 128, 3), "float32")
    group = Scheduled([a], te.compute((n, 128, 3), lambda i, j, k: -a(i, j, k)), target)
    for count in (1, 2, 41, 100):
        x = numbers(count, 128, 3)
        assert np.array_equal(group([x], (x.shape, "float32")), -x)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 9, 11, 64), (0, 3, 1, 2)),
        ((2, 64, 9, 11), (0, 2, 3, 1)),
        ((3, 12, 33, 32), (0, 2, 1, 3)),
        ((3, 5, 17, 33), (0, 1, 3, 2)),
        ((48, 32), (1, 0)),
        ((1, 40), (1, 0)),
        ((7, 5, 3), (2, 1, 0)),
        ((2, 3, 20), (0, 2, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_transpose(target: Any, shape: tuple[int, ...], order: tuple[int, ...], dtype: str) -> None:
    x = (numbers(*shape) * 1000).astype(dtype)
    a = te.placeholder(shape, dtype)
    out = tuple(shape[axis] for axis in order)
    back = [order.index(axis) for axis in range(len(order))]
    group = Scheduled([a], te.compute(out, lambda *i: a(*[i[axis] for axis in back])), target)
    assert np.array_equal(group([x], (out, dtype)), x.transpose(order))


@pytest.mark.parametrize("channels", [1, 3, 4, 24])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_what_is_computed_on_the_way_to_another_order(target: Any, channels: int, known: bool, dtype: str) -> None:
    """The first layer of a network of integers: planes of an image to pixels of codes."""
    h, w = symbols("h", "w")
    for height, width in ((1, 1), (2, 5), (3, 16), (2, 17), (1, 40)):
        dims, out = (height, width) if known else (h, w), (2, height, width, channels)
        a = te.placeholder((2, channels, *dims), "float32")
        codes = te.compute((2, *dims, channels), lambda b, y, x, c: _code(a(b, c, y, x), dtype))  # noqa: B023
        x = np.round(numbers(2, channels, height, width) * 8) / 8  # exact with and without a fused multiply-add
        expected = np.floor(np.maximum(x * 16 + 100, 0)).astype(dtype).transpose(0, 2, 3, 1)
        assert np.array_equal(Scheduled([a], codes, target)([x], (out, dtype)), expected), (height, width)


def _code(value: Any, dtype: str) -> Any:
    return tirx.Cast(dtype, tirx.floor(tirx.max(value * 16.0 + 100.0, tirx.const(0, "float32"))))


def test_transpose_of_symbolic_shape(target: Any) -> None:
    b, n = symbols("b", "n")
    a = te.placeholder((b, 4, n, 32), "float32")
    group = Scheduled([a], te.compute((b, 4, 32, n), lambda i, j, k, m: a(i, j, m, k)), target)
    for size in ((1, 1), (2, 16), (3, 50)):
        x = numbers(size[0], 4, size[1], 32)
        assert np.array_equal(group([x], ((size[0], 4, 32, size[1]), "float32")), x.transpose(0, 1, 3, 2))


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_reads_nothing_outside(target: Any, axis: int) -> None:
    n, m = symbols("n", "m")
    a = te.placeholder((n, m), "float32")
    shape = (n + 5, m) if axis == 0 else (n, m + 5)

    def element(i: Any, j: Any) -> Any:
        place = [i, j]
        place[axis] = place[axis] - 2
        inside = tirx.all(place[axis] >= 0, place[axis] < (n, m)[axis])
        # exp makes names that must not be computed for what is outside.
        return tirx.if_then_else(inside, mathfn.exp(a(*place)), tirx.const(0, "float32"))

    group = Scheduled([a], te.compute(shape, element), target)
    for size in ((3, 7), (20, 33)):
        x = numbers(*size)
        pads = [(0, 0), (0, 0)]
        pads[axis] = (2, 3)
        out = (size[0] + 5, size[1]) if axis == 0 else (size[0], size[1] + 5)
        got = group([x], (out, "float32"))
        assert np.all(np.abs(got - np.pad(np.exp(x.astype(np.float64)), pads)) <= 2**-22 * np.abs(got))


def test_joined_tensors_are_cut_at_the_seams(target: Any) -> None:
    (n,) = symbols("n")
    a, b = te.placeholder((n, 40), "float32"), te.placeholder((n, 24), "float32")

    def element(i: Any, j: Any) -> Any:
        return tirx.if_then_else(
            j < 40, a(i, j), tirx.if_then_else(j - 40 < 24, b(i, j - 40), tirx.const(1, "float32"))
        )

    group = Scheduled([a, b], te.compute((n, 70), element), target)
    x, y = numbers(5, 40), numbers(5, 24)
    want = np.concatenate([x, y, np.ones((5, 6), np.float32)], axis=1)
    assert np.array_equal(group([x, y], ((5, 70), "float32")), want)
    cuts = pieces(tirx.if_then_else(AXIS < 4, AXIS, AXIS - 4), Axis(AXIS, tirx.const(12, "int64")))
    assert cuts is not None and [(begin, end) for begin, end, _ in cuts] == [(0, 4), (4, 12)]
    assert cuts[0][2].same_as(AXIS)
    # What cannot be decided keeps its guard.
    third = te.compute((n, 40), lambda i, k: tirx.if_then_else(tirx.floormod(k, 3) < 1, a(i, k), -a(i, k)))
    want = np.where(np.arange(40) % 3 < 1, x, -x)
    assert np.array_equal(Scheduled([a], third, target)([x], (x.shape, "float32")), want)


def test_rows_of_a_table(target: Any) -> None:
    (n,) = symbols("n")
    table, places = te.placeholder((100, 50), "float32"), te.placeholder((n,), "int64")
    group = Scheduled([table, places], te.compute((n, 50), lambda i, j: table(places(i), j)), target)
    x, where = numbers(100, 50), np.array([99, 0, 0, 17], np.int64)
    assert np.array_equal(group([x, where], ((4, 50), "float32")), x[where])


def test_comparisons_casts_and_selection(target: Any) -> None:
    (n,) = symbols("n")
    x, flags = numbers(33, 50) * 10, numbers(33, 50) > 0
    a, f = te.placeholder((n, 50), "float32"), te.placeholder((n, 50), "bool")
    greater = Scheduled([a], te.compute((n, 50), lambda i, j: a(i, j) > tirx.const(0.5, "float32")), target)
    assert np.array_equal(greater([x], (x.shape, "bool")), x > 0.5)
    cast = Scheduled([a], te.compute((n, 50), lambda i, j: tirx.Cast("int64", a(i, j))), target)
    assert np.array_equal(cast([x], (x.shape, "int64")), x.astype(np.int64))
    chosen = te.compute((n, 50), lambda i, j: tirx.Select(f(i, j), a(i, j), tirx.const(0, "float32")))
    assert np.array_equal(Scheduled([a, f], chosen, target)([x, flags], (x.shape, "float32")), np.where(flags, x, 0))


def test_a_chain_of_functions_compiles_and_is_right(target: Any) -> None:
    """Without `lower_lets` the time to compile is exponential in the length of such a chain."""
    a = te.placeholder((100,), "float32")
    x = numbers(100)

    def chain(v: Any) -> Any:
        return mathfn.gelu(mathfn.tanh(mathfn.exp(mathfn.tanh(v)) - tirx.const(1.0, "float32")) * v)

    group = Scheduled([a], te.compute((100,), lambda i: chain(a(i))), target)
    from math import erf

    wide = x.astype(np.float64)
    inner = np.tanh(np.exp(np.tanh(wide)) - 1) * wide
    want = inner * 0.5 * (1 + np.vectorize(erf)(inner * np.sqrt(0.5)))
    # Each function is right to 4 ulp and its derivative is below e at these arguments.
    assert np.all(np.abs(group([x], ((100,), "float32")) - want) <= 40 * 2**-24 * (np.abs(want) + 1))


def test_code_is_vectors_of_the_target() -> None:
    a = te.placeholder((64, 48), "float32")
    out = te.compute((64, 48), lambda i, j: mathfn.gelu(a(i, j)))
    registers = {"x86:avx2": "ymm", "x86:avx512vnni": "zmm"}
    for target in HERE:
        text = Scheduled([a], out, target).assembly()
        assert registers[target.name] in text and "vfmadd" in text and "expf" not in text
    neon = Scheduled([a], out, NEON).assembly()
    assert "fmla\tv" in neon and "\texpf" not in neon and "\terff" not in neon
    turned = Scheduled([a], te.compute((48, 64), lambda i, j: a(j, i)), NEON).assembly()
    assert "zip1\tv" in turned


def test_a_tail_shorter_than_a_vector_is_not_written_where_there_is_none() -> None:
    """Inside it TVM simplifies other sizes to 0, as sizes of rows it then divides by."""
    whole = dims.symbol("n")
    for extent, conditions in ((dims.minimum(240, whole) + 160, 1), (whole, 2)):
        found: list[tirx.IfThenElse] = []
        statement = nest.across(extent, tirx.Evaluate, repeatable=True)
        tvm_ffi.structural_walk(statement, (tirx.IfThenElse, found.append))
        assert len(found) == conditions
