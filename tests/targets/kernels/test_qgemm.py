"""Integer matrix products and convolutions with AVX512-VNNI, and what all CPU targets share."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tvm import tirx

from kbitc.bundle.engine import set_threads
from kbitc.targets.lower.contraction import ConvAttributes
from kbitc.targets.target import parse_target
from tests.support import kernels
from tests.support.kernels import Case, Compiled
from tests.support.products import (
    CASES,
    CONVOLUTIONS,
    MORE_CASES,
    NEON,
    RANDOM,
    RULE,
    VNNI,
    check,
    compiled,
    need,
    results,
)


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    need(VNNI)
    check(case, results(VNNI))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 17])
def test_symbolic_rows(rows: int) -> None:
    need(VNNI)
    x = RANDOM.standard_normal((rows, 70)).astype(np.float32)
    outputs = symbolic().run([x])
    wanted = kernels.expected(x[:, None], symbolic().cases[0].contraction.weight)
    np.testing.assert_array_equal(outputs["symbolic.accumulators"], wanted.accumulators)


@cache
def symbolic() -> Compiled:
    """One module for any number of rows."""
    weight = kernels.random_weight("uint3:b32:zp", (40, 1, 70))
    rows = tirx.Var("rows", "int64")
    contraction = kernels.matmul("symbolic", weight, (rows,), accumulators_out=True)
    return kernels.compile_cases(
        [Case("symbolic", RULE, contraction, np.zeros((1, 70), np.float32))], parse_target(VNNI)
    )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    need(VNNI)
    runs = []
    for threads in (1, 2):
        set_threads(threads)
        runs.append(compiled(VNNI).run())
    set_threads(1)
    for name, wanted in runs[0].items():
        for other in runs[1:]:
            np.testing.assert_array_equal(other[name], wanted, err_msg=name)


def test_vnni_build_uses_vpdpbusd_on_zmm() -> None:
    assembly = compiled(VNNI).assembly()
    hot = kernels.hot_blocks(assembly, "vpdpbusd")
    assert hot and all("call" not in block for block in hot)
    assert any("%zmm" in line for block in hot for line in block.splitlines() if "vpdpbusd" in line)
    # Instructions of AVX512-VBMI, which the target does not promise.
    assert "vpermb" not in assembly and "vpmultishiftqb" not in assembly


def test_grouped_convolution_is_declined() -> None:
    weight = kernels.random_weight("int4:b32", (8, 9, 4))
    grouped = kernels.convolution("g", weight, (1, 5, 5), ConvAttributes((3, 3), group=2))
    assert "groups" in str(RULE.match(grouped, parse_target(NEON)))


def test_float_activations_are_declined() -> None:
    weight = kernels.random_weight("int4:b32", (8, 1, 32))
    assert "float" in str(RULE.match(kernels.matmul("f", weight, (1,), "float32"), parse_target(NEON)))
