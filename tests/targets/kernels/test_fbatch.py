"""Products of two activations, against float64 within the bound of a sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import tirx

from kbitc.targets.cpu.rules.float import FloatBatchProduct
from kbitc.targets.lower.contraction import Contraction
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support.float_kernels import Compiled, check_sum, uniform

TARGETS = ("x86:avx2", "x86:avx512vnni")


def target_here(name: str) -> Target:
    target = parse_target(name)
    reason = host_runs(target)
    if reason is not None:
        pytest.skip(reason)
    return target


def product(a: Any, b: Any) -> Any:
    return a @ b


def contraction(a: tuple[Any, ...], b: tuple[Any, ...], out: tuple[Any, ...], **more: Any) -> Contraction:
    return Contraction("node", "batch_matmul", None, "float32", a, out, b_shape=b, **more)


CASES = [
    ((3, 5, 7), (3, 7, 9)),
    ((2, 3, 17, 33), (2, 3, 33, 40)),
    ((1, 1, 1), (1, 1, 1)),
    ((4, 1, 8), (4, 8, 100)),
    ((25, 6), (6, 16)),
    ((1, 3, 26, 5), (2, 1, 5, 31)),
    ((2, 3, 13, 5), (5, 64)),
    ((13, 5), (2, 1, 5, 18)),
]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("a_shape", "b_shape"), CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_and_broadcasting(
    name: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], transposed: bool
) -> None:
    a, b = uniform(1, *a_shape), uniform(2, *b_shape)
    given = np.ascontiguousarray(np.swapaxes(b, -1, -2)) if transposed else b
    out = np.broadcast_shapes(a_shape[:-2], b_shape[:-2]) + (a_shape[-2], b_shape[-1])
    what = contraction(a_shape, given.shape, out, transpose_b=transposed)
    check_sum(Compiled(FloatBatchProduct(), what, target_here(name))(a, given), product, a, b, a_shape[-1])


@pytest.mark.parametrize(("name", "transposed"), [("x86:avx2", True), ("x86:avx512vnni", False)])
def test_every_dimension_symbolic(name: str, transposed: bool) -> None:
    batch, m, c, n = (tirx.Var(letter, "int64") for letter in "bmcn")
    second = (batch, 2, n, c) if transposed else (batch, 2, c, n)
    what = contraction((batch, 2, m, c), second, (batch, 2, m, n), transpose_b=transposed)
    run = Compiled(FloatBatchProduct(), what, target_here(name))
    for sizes in ((1, 1, 1, 1), (2, 3, 4, 15), (1, 12, 9, 16), (1, 13, 5, 17), (3, 30, 33, 50), (1, 220, 3, 33)):
        a, b = uniform(1, sizes[0], 2, *sizes[1:3]), uniform(2, sizes[0], 2, *sizes[2:])
        given = np.ascontiguousarray(np.swapaxes(b, -1, -2)) if transposed else b
        check_sum(run(a, given), product, a, b, sizes[2])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (2, 16), (4, 48), (1, 256)])
def test_few_rows_meet_a_transposed_operand_of_any_length(name: str, rows: int, channels: int) -> None:
    n = tirx.Var("n", "int64")
    what = contraction((2, 3, rows, channels), (2, 1, n, channels), (2, 3, rows, n), transpose_b=True)
    run = Compiled(FloatBatchProduct(), what, target_here(name))
    for columns in (1, 7, 15, 16, 17, 257):
        a, b = uniform(1, 2, 3, rows, channels), uniform(2, 2, 1, channels, columns)
        given = np.ascontiguousarray(np.swapaxes(b, -1, -2))
        check_sum(run(a, given), product, a, b, channels)


def test_few_rows_give_the_same_bits_static_symbolic_and_on_both_vector_widths() -> None:
    n = tirx.Var("n", "int64")
    a, b = uniform(1, 2, 1, 64), uniform(2, 2, 37, 64)
    results = []
    for name in TARGETS:
        for size in (37, n):
            what = contraction((2, 1, 64), (2, size, 64), (2, 1, size), transpose_b=True)
            results.append(Compiled(FloatBatchProduct(), what, target_here(name))(a, b))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_attention_shapes_give_the_same_bits_static_symbolic_and_on_both_vector_widths() -> None:
    s = tirx.Var("s", "int64")
    a, b = uniform(1, 2, 21, 21), uniform(2, 2, 21, 32)
    results = []
    for name in TARGETS:
        for size in (21, s):
            what = contraction((2, size, size), (2, size, 32), (2, size, 32))
            results.append(Compiled(FloatBatchProduct(), what, target_here(name))(a, b))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize(("name", "pattern"), [("x86:avx512vnni", "zmm"), ("arm-neon:dotprod", ".4s")])
def test_columns_are_vectors(name: str, pattern: str) -> None:
    what = contraction((12, 128, 32), (12, 32, 128), (12, 128, 128))
    text = Compiled(FloatBatchProduct(), what, parse_target(name)).assembly()
    assert len([x for x in text.splitlines() if ("vfmadd" in x or "fmla" in x) and pattern in x]) >= 24
