"""Every solver on every kind of data type and scale: a valid weight, and no worse than rounding to nearest."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from kbitc import catalog
from kbitc.passes.solvers import rtn
from kbitc.quant.learn import data_type_of
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme

SOLVERS = "kbitc.passes.solvers"
SCHEMES = (
    *("fp2:b32", "fp4-e2m1:b32", "fp6-e3m2:c", "fp8-e4m3:b32", "log2-4:b32", "dynexp4:b32", "dynexp8:b32"),
    *("quantile3:b32", "kmeans2:t", "kmeans3:b32", "int4:b32/i4", "uint4:b32/i4:zp", "nf4:b32:dq8", "int3:c:dq8"),
)


def _weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 1, 96)).astype(np.float32)


def _moments() -> InputMoments:
    """Correlated inputs of very different sizes."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 96)) * np.exp(rng.normal(size=96)) @ (np.eye(96) + 0.1 * rng.normal(size=(96, 96)))
    rows = x.astype(np.float32)[None]
    known = {
        "second": rows.transpose(0, 2, 1) @ rows / len(x), "mean": rows.mean(1), "mean_abs": np.abs(rows).mean(1),
        "peak": np.abs(rows).max(1), "count": len(x),
    }  # fmt: skip
    return InputMoments(**{field.name: known[field.name] for field in fields(InputMoments)})  # type: ignore[arg-type]


def _loss(weight: np.ndarray, value: np.ndarray, inputs: InputMoments) -> float:
    return float(inputs.output_power(weight - value).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("solver", catalog.names(SOLVERS))
def test_solvers_take_every_data_type(solver: str, scheme: str) -> None:
    weight, inputs, wanted = _weight(), _moments(), QuantScheme.parse(scheme)
    solve = catalog.find(SOLVERS, solver, "solver").solve
    for moments in (None, inputs):
        tensor = solve(weight, wanted, moments)
        assert tensor.scheme == wanted and tensor.shape == weight.shape
        assert np.isfinite(tensor.dequantize()).all()
    if solver in ("gptq", "adaround"):
        plain = rtn.solve(weight, wanted, inputs)
        assert _loss(weight, tensor.dequantize(), inputs) <= _loss(weight, plain.dequantize(), inputs) * (1 + 1e-6)


def test_a_learned_table_is_weighted_by_the_power_of_its_inputs() -> None:
    """For given scales the weighted table has the least weighted error of all tables."""
    weight, inputs, scheme = _weight(), _moments(), QuantScheme.parse("kmeans3:b32:f32")
    importance = inputs.power.reshape(1, 1, -1)
    errors = [
        float((importance * (weight - rtn.solve(weight, scheme, given).dequantize()) ** 2).sum())
        for given in (inputs, None)
    ]
    assert errors[0] < errors[1]
    assert data_type_of(weight, scheme, importance) == rtn.solve(weight, scheme, inputs).format
