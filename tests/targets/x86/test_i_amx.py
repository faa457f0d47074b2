"""Integer graphs on AMX tiles: products and convolutions of codes equal int64 numpy, for every layout of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import tvm

from kbitc.quant.levels import of_levels
from kbitc.targets.cpu.rules.integer import CodeProduct
from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.target import parse_target
from tests.support import amx, kernels
from tests.support.integer_products import check, conv, levels, matmul, reset

RULE = CodeProduct()
THREE = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))


def check_on_tiles(contractions: Sequence[Contraction], values: str = "random") -> None:
    """Every integer is right, tiles made them, and no thread keeps its tiles."""
    emulator, target = amx.emulator(), parse_target(amx.AMX)
    cases = [reset(RULE, contraction, values) for contraction in contractions]
    for case in cases:
        assert "tdpbusd" in kernels.compile_cases([case], target).assembly(), f"{case.name} is left to dot products"
    check(cases, target)
    assert emulator is None or emulator.configured_threads() == 0


def test_grids_factors_and_rows() -> None:
    check_on_tiles(
        [
            matmul("bytes", levels(8, "bytes", (40, 1, 128)), (33,), accumulators_out=True),
            matmul("affine", levels(4, "affine", (33, 1, 72)), (17,)),
            matmul("double", levels(3, "double", (15, 1, 36)), (15,), per_channel=False),
            matmul("table", levels(5, "table", (16, 1, 64)), (9,), requantized=False),
            matmul("factors", levels(4, "two", (33, 1, 140), block=32), (48,)),
            matmul("wide_factors", levels(2, "two", (20, 1, 100), block=64), (64,)),
            matmul("wide_shift", levels(1, "affine", (17, 1, 8)), (16,), shift=60),
        ]
    )


def test_convolutions() -> None:
    check_on_tiles(
        [
            conv("padded", levels(8, "bytes", (40, 9, 64)), (2, 5, 8), THREE),
            conv("long_lines", levels(8, "bytes", (17, 9, 20)), (1, 3, 56), THREE),
            conv("strided", levels(4, "affine", (33, 9, 24)), (1, 9, 17), ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))),
            conv("point", levels(8, "bytes", (64, 1, 64)), (1, 7, 7), ConvAttributes((1, 1))),
            conv("point_strided", levels(8, "bytes", (16, 1, 32)), (2, 8, 8), ConvAttributes((1, 1), (2, 2))),
            conv("factors", levels(4, "two", (10, 9, 40), block=32), (1, 5, 5), THREE),
            conv("dilated", levels(8, "bytes", (16, 6, 64)), (1, 9, 10),
                 ConvAttributes((3, 2), (1, 1), (1, 0, 2, 0), (2, 1))),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("values", ["zero", "largest", "smallest", "outlier"])
def test_extreme_values(values: str) -> None:
    """All codes 0 or 255 by all levels -128 or 127, between two pixels of other rows."""
    weights = [of_levels(np.full((16, 1, 260), level, np.int8)) for level in (-128, 127)]
    check_on_tiles([matmul(f"m{i}", weight, (17,), zero=255 * i) for i, weight in enumerate(weights)], values)


def test_symbolic_batches_choose_by_their_rows() -> None:
    m = tvm.tirx.Var("m", "int64")
    fixed = reset(RULE, matmul("m", levels(4, "affine", (40, 1, 68)), (70,)))
    target, emulator = parse_target(amx.AMX), amx.emulator()
    symbolic = reset(RULE, matmul("m", levels(4, "affine", (40, 1, 68)), (70,)))
    opened = replace(symbolic.contraction, x_shape=(m, 68), out_shape=(m, 40))
    run = kernels.compile_cases([replace(symbolic, contraction=opened)], target)
    whole = kernels.compile_cases([fixed], target).run()["m"]
    for rows in (1, 7, 8, 31, 70):
        before = None if emulator is None else emulator.counts()
        np.testing.assert_array_equal(run.run([fixed.x[:rows]])["m"], whole[:rows], err_msg=f"{rows} rows")
        if emulator is not None and before is not None:
            assert (emulator.counts().since(before).dot > 0) == (rows >= 8)
