"""What every solver has to keep: valid codes, storable scales, determinism, never worse than round to nearest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from kbitc import catalog
from kbitc.passes.solvers import hqq, rtn
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import scale_shape

SOLVERS = catalog.names("kbitc.passes.solvers")
SCHEMES = ["int4:b32", "int3:b16", "int2:b32", "int1:b32", "int8:b32", "uint3:b32", "nf4:b32", "int4:c", "uint4:t"]
SCHEMES += ["int3:t:f32", "uint3:b32:min", "uint1:b16:min", "uint4:c:min", "uint2:t:min:f32"]
Array = npt.NDArray[np.float32]
# float32 sums of up to 90 terms, compared with each other.
SLACK = 1 + 1e-4


def problem(groups: int = 1, n: int = 12, taps: int = 2, channels: int = 40) -> tuple[Array, InputMoments]:
    """A weight and correlated, shifted inputs."""
    rng = np.random.default_rng(5)
    weight = (rng.normal(size=(n, taps, channels)) * rng.uniform(0.2, 2.0, (n, 1, 1))).astype(np.float32)
    size = taps * channels
    x = rng.normal(size=(groups, 400, size // 4)) @ rng.normal(size=(groups, size // 4, size)) * 0.3
    x = np.maximum(x + rng.normal(size=(groups, 400, size)) * 0.2, 0).astype(np.float32)
    second = x.transpose(0, 2, 1) @ x / x.shape[1]
    return weight, InputMoments(second, x.mean(1), np.abs(x).mean(1), np.abs(x).max(1), x.shape[1])


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("name", SOLVERS)
def test_never_worse_than_round_to_nearest_on_the_output(name: str, text: str) -> None:
    weight, inputs = problem()
    scheme = QuantScheme.parse(text)
    found = catalog.find("kbitc.passes.solvers", name, "solver").solve(weight, scheme, inputs)
    plain = rtn.solve(weight, scheme)
    if name == "hqq":
        old, new = (float(hqq.norm(weight - each.dequantize()).sum()) for each in (plain, found))
    elif name == "four_scales":
        old, new = (float(np.square(weight - each.dequantize()).sum()) for each in (plain, found))
    elif name == "mse_clip":
        # Its own objective: the diagonal of the second moments.
        power = np.broadcast_to(inputs.power.reshape(1, *weight.shape[1:]), weight.shape)
        old, new = (float((power * (weight - each.dequantize()) ** 2).sum()) for each in (plain, found))
    else:
        old, new = (float(inputs.output_power(weight - each.dequantize()).sum()) for each in (plain, found))
    assert new <= old * SLACK


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_results_are_valid_and_the_same_again(name: str, text: str, calibrated: bool) -> None:
    weight, inputs = problem()
    scheme = QuantScheme.parse(text)
    solve = catalog.find("kbitc.passes.solvers", name, "solver").solve
    found, again = (solve(weight, scheme, inputs if calibrated else None) for _ in range(2))
    assert found.codes.shape == weight.shape and found.codes.dtype == np.uint8
    assert int(found.codes.max()) < 2**scheme.bits
    assert found.scales.shape == scale_shape(weight.shape, scheme) and found.scales.dtype == np.float32
    assert (found.scales != 0).all() and np.isfinite(found.scales).all()
    if ":f32" not in text:
        np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    assert (found.zero_points is not None) == scheme.zero_point and (found.offsets is not None) == scheme.offset
    if found.offsets is not None and ":f32" not in text:
        np.testing.assert_array_equal(found.offsets, found.offsets.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found.dequantize(), again.dequantize())


@pytest.mark.parametrize("name", SOLVERS)
def test_grouped_inputs_are_solved_group_by_group(name: str) -> None:
    weight, inputs = problem(groups=3)
    solve = catalog.find("kbitc.passes.solvers", name, "solver").solve
    scheme = QuantScheme.parse("int3:b16")
    whole = solve(weight, scheme, inputs).dequantize()
    for group in range(3):
        part = slice(group, group + 1)
        first = (inputs.mean[part], inputs.mean_abs[part], inputs.peak[part])
        alone = InputMoments(inputs.second[part], *first, inputs.count)
        rows = slice(4 * group, 4 * group + 4)
        one = alone.output_power(weight[rows] - solve(weight[rows], scheme, alone).dequantize())
        together = alone.output_power(weight[rows] - whole[rows])
        # Alone a group may choose an order of its own columns; it must not be solved with another's moments.
        assert together.sum() < 2 * one.sum()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_weight_on_the_grid_stays_there(name: str) -> None:
    """Its error is 0, and no solver takes what is worse."""
    weight, inputs = problem()
    scheme = QuantScheme.parse("uint4:b32:min")
    grid = rtn.solve(rtn.solve(weight, scheme).dequantize(), scheme).dequantize()
    found = catalog.find("kbitc.passes.solvers", name, "solver").solve(grid, scheme, inputs)
    np.testing.assert_array_equal(found.dequantize(), grid)


@pytest.mark.parametrize("name", ["mse_clip", "hqq", "gptq"])
def test_offsets_fit_shifted_weights_better_than_zero_points(name: str) -> None:
    """Three levels of a zero point cannot follow blocks that lie anywhere."""
    weight, inputs = problem()
    solve = catalog.find("kbitc.passes.solvers", name, "solver").solve
    weight = weight + np.random.default_rng(9).normal(size=(12, 2, 1)).astype(np.float32) * 3
    errors = []
    for rest in ("min", "zp"):
        rest = weight - solve(weight, QuantScheme.parse(f"uint3:b16:{rest}"), inputs).dequantize()
        errors.append(float(hqq.norm(rest).sum() if name == "hqq" else np.square(rest).sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_weights_and_dead_inputs(name: str) -> None:
    weight, inputs = problem()
    weight[1] = 0
    second = inputs.second.copy()
    second[:, :10] = 0
    second[:, :, :10] = 0
    dead = replace(inputs, second=second)
    found = catalog.find("kbitc.passes.solvers", name, "solver").solve(weight, QuantScheme.parse("int3:b32"), dead)
    value = found.dequantize()
    assert not value[1].any() and np.isfinite(value).all()
