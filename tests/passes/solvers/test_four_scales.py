"""The best of four scales: never worse than round to nearest, and each of the four is taken where it is the best."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.passes.solvers import four_scales, rtn
from kbitc.quant.scheme import QuantScheme


@pytest.mark.parametrize("text", ["int2:b32", "int3:b32", "int4:b16:f32", "int4:c", "int4:t", "int8:c"])
def test_no_block_is_worse_than_rounded_to_nearest(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = np.random.default_rng(0).normal(size=(6, 2, 80)).astype(np.float32)
    plain, found = (np.square(weight - each.solve(weight, scheme).dequantize()) for each in (rtn, four_scales))
    assert found.sum() < plain.sum()
    blocks = np.add.reduceat(found - plain, range(0, 80, scheme.block or 80), axis=2)
    if text[-1] not in "ct":  # there a scale serves more than these sums
        assert (blocks <= 0).all()


def test_every_scale_is_taken_where_it_fits() -> None:
    """-2 .. 1: nothing clipped, half a step clipped, turned round, and both."""
    rows = [
        [-2, 1, 1, -2, 1, 0],
        [-2.4, 1.4, -1, 1, -1, 1],
        [2, -1, -1, 2, -1, 0],
        [2.4, -1.4, 1, -1, 1, -1],
    ]
    weight = np.array(rows, np.float32).reshape(4, 1, 6)
    found = four_scales.solve(weight, QuantScheme.parse("int2:b16:f32"))
    np.testing.assert_allclose(found.scales.reshape(-1), [1, 2.4 / 2.5, -1, -2.4 / 2.5], rtol=2.0**-22)


def test_weights_on_a_grid_stay_as_they_are() -> None:
    weight = np.random.default_rng(1).integers(-7, 8, (4, 1, 64)).astype(np.float32)
    weight[..., ::16] = 7
    np.testing.assert_array_equal(four_scales.solve(weight, QuantScheme.parse("int4:b16")).dequantize(), weight)


@pytest.mark.parametrize("text", ["uint4:b32:zp", "nf4:b32", "int1:b32", "int4:b32/i4"])
def test_other_types_are_rounded_to_nearest(text: str) -> None:
    weight = np.random.default_rng(2).normal(size=(3, 1, 64)).astype(np.float32)
    found, plain = (each.solve(weight, QuantScheme.parse(text)) for each in (four_scales, rtn))
    np.testing.assert_array_equal(found.dequantize(), plain.dequantize())
