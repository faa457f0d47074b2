"""GPTQ: the factorisation, the exact small case, and what each part of it wins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kbitc.passes.solvers import gptq, mse_clip, rtn
from kbitc.passes.solvers._blocks import signed_scales
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme


def inputs_of(x: np.ndarray) -> InputMoments:
    second = (x.T @ x / len(x)).astype(np.float32)
    size = np.abs(x)[None].astype(np.float32)
    return InputMoments(second[None], x.mean(0)[None].astype(np.float32), size.mean(1), size.max(1), len(x))


def correlated(size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2000, size // 4)) @ rng.normal(size=(size // 4, size)) + 0.1 * rng.normal(size=(2000, size))


def test_the_factor_gives_the_matrix_back() -> None:
    second = inputs_of(correlated(24)).second
    upper, pivots = gptq.factor(second, 0.01)
    mean = np.trace(second[0]) / 24
    back = upper[0] @ np.diag(pivots[0]) @ upper[0].T
    np.testing.assert_allclose(np.tril(upper[0], -1), 0)
    np.testing.assert_allclose(np.diag(upper[0]), 1)
    # float32 factors of a matrix with trace 24 * mean
    assert np.abs(back - second[0] - 0.01 * mean * np.eye(24)).max() <= 24 * 24 * mean * np.finfo(np.float32).eps


def test_two_columns_are_rounded_as_well_as_can_be() -> None:
    """With K = 2 the second column repairs the first one exactly as far as the grid allows: enumerate all codes."""
    x = np.array([[1.0, 0.9], [0.9, 1.0], [1.0, 1.1]])
    inputs = inputs_of(np.repeat(x, 10, axis=0))
    weight = np.random.default_rng(1).normal(size=(30, 1, 2)).astype(np.float32)
    found = gptq.solve(weight, QuantScheme.parse("int2:c:f32"), inputs)
    error = inputs.output_power(weight - found.dequantize())
    grid = np.array([-2, -1, 0, 1])
    for row in range(30):
        scale = found.scales[row].item()
        options = np.array([[a, b] for a, b in itertools.product(grid, grid)], np.float32)[:, None] * scale
        best = inputs.output_power(weight[row : row + 1] - options).min()
        # Coordinate descent stops where no single code is better, which on a 4 x 4 grid is close to the best pair.
        assert error[row] <= best * 1.5 + 1e-6


@pytest.mark.parametrize("text", ["int4:b32", "int3:b32", "int2:b32", "nf4:b32", "uint3:b32", "int4:c"])
def test_correlated_inputs_are_used(text: str) -> None:
    inputs = inputs_of(correlated(64))
    weight = np.random.default_rng(1).normal(size=(16, 1, 64)).astype(np.float32)
    scheme = QuantScheme.parse(text)
    clip = inputs.output_power(weight - mse_clip.solve(weight, scheme, inputs).dequantize()).sum()
    plain = inputs.output_power(weight - gptq.solve(weight, scheme, inputs, sweeps=0).dequantize()).sum()
    swept = inputs.output_power(weight - gptq.solve(weight, scheme, inputs).dequantize()).sum()
    # 64 columns of rank 16 and a little noise: most of the error can be moved where no input sees it.
    assert plain < 0.5 * clip and swept < plain


def test_without_data_it_is_the_clipping_search() -> None:
    weight = np.random.default_rng(1).normal(size=(4, 1, 64)).astype(np.float32)
    scheme = QuantScheme.parse("int3:b32")
    np.testing.assert_array_equal(gptq.solve(weight, scheme).dequantize(), mse_clip.solve(weight, scheme).dequantize())


def test_a_block_turns_its_grid_round_where_that_fits_better() -> None:
    """-2 .. 1 reaches further below zero: a block with one large positive weight takes a negative scale."""
    weight = np.array([2.0, -1, 1, 0, 1, -1, 0, 0] * 2, np.float32).reshape(1, 1, 16)
    found = mse_clip.solve(weight, QuantScheme.parse("int2:b16:f32"))
    assert found.scales.item() < 0
    np.testing.assert_allclose(found.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("text", ["int3:b16/i4", "int4:b32/i4:f32", "uint4:b32/i4:zp"])
def test_integer_block_scales_are_searched_too(text: str) -> None:
    """They stay multiples of the channel's step, which `QTensor` checks."""
    rng, scheme = np.random.default_rng(3), QuantScheme.parse(text)
    weight, inputs = rng.standard_t(4, size=(16, 1, 64)).astype(np.float32), inputs_of(correlated(64))
    plain = rtn.solve(weight, scheme)
    for found, power in (
        (mse_clip.solve(weight, scheme), lambda error: np.square(error).sum()),
        (gptq.solve(weight, scheme, inputs), lambda error: inputs.output_power(error).sum()),
    ):
        assert power(weight - found.dequantize()) < power(weight - plain.dequantize())
        assert (found.scales != plain.scales).any() and found.scale_steps is not None


def test_only_float_block_scales_of_a_lopsided_grid_are_signed() -> None:
    for text, signed in (("int4:b32", True), ("int4:c", False), ("uint4:b32", False), ("nf4:b32", False)):
        scheme = QuantScheme.parse(text)
        assert signed_scales(scheme.data_type(), scheme) is signed


def test_few_rows_are_trusted_less() -> None:
    inputs = inputs_of(correlated(24)[:24])
    found = inputs.shrunk()
    np.testing.assert_array_equal(found.power, inputs.power)
    np.testing.assert_array_equal(found.second[0][0, 1:], inputs.second[0][0, 1:] * np.float32(0.5))


def test_shrinking_helps_on_rows_that_were_not_seen() -> None:
    """40 rows for 64 inputs: without shrinking GPTQ moves errors where only these 40 rows do not see them."""
    rng = np.random.default_rng(0)
    few, many = inputs_of(rng.normal(size=(40, 64))), inputs_of(rng.normal(size=(4000, 64)))
    weight = rng.normal(size=(32, 1, 64)).astype(np.float32)
    scheme = QuantScheme.parse("int3:b32")
    certain = InputMoments(few.second, few.mean, few.mean_abs, few.peak, 10**9)
    shrunk, blind = (
        many.output_power(weight - gptq.solve(weight, scheme, each).dequantize()).sum() for each in (few, certain)
    )
    assert shrunk < 0.5 * blind
