"""Inputs of a layer in two models together: the weight that makes up for the difference, and the mean that is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.graph.evaluate import evaluate
from kbitc.options import Method
from kbitc.passes.calibrate.moments import readers
from kbitc.passes.calibrate.paired import Pair, Sample, Walks, paired_moments
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.passes.solvers import rtn
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.targets.target import parse_target
from tests.support.onnx_text import model

Array = npt.NDArray[Any]
GRAPH = "agraph (float[512, 8] x) => (float[512, 8] y) { h = MatMul(x, u)  y = MatMul(h, w) }"
RNG = np.random.default_rng(0)
U, W = (RNG.normal(size=(8, 8)).astype(np.float32) for _ in range(2))
X = RNG.normal(1, 1, (512, 8)).astype(np.float32)


def two_models(other: Array) -> tuple[ir.Model, ir.Model]:
    return model(GRAPH, {"u": U, "w": W}), model(GRAPH, {"u": other, "w": W})


def first(made: ir.Model) -> str:
    return next(node.name or "" for node in made.graph if node.outputs[0].name == "y")


def pair(other: Array, *, centred: bool) -> Pair:
    before, after = two_models(other)
    found = readers({"w": [node for node in before.graph if node.outputs[0].name == "y"]})
    return paired_moments(before, after, found, Walks([{"x": X}]), first(before), centred=centred)["w"]


@pytest.mark.parametrize("centred", [False, True])
def test_a_layer_makes_up_for_what_came_before(centred: bool) -> None:
    """h' = h M with an invertible M: W* = M^-1 W up to the ridge, which is far smaller than M's change."""
    changed = (U @ (np.eye(8) + 0.3 * RNG.normal(size=(8, 8)))).astype(np.float32)
    found = pair(changed, centred=centred)
    target = found.target(W.T.reshape(8, 1, 8)).reshape(8, 8).T
    before, after = two_models(changed)
    want = evaluate(before, {"x": X})["y"]
    plain = evaluate(after, {"x": X})["y"]
    fitted = X @ changed @ target
    if centred:
        fitted, want, plain = (array - array.mean(axis=0) for array in (fitted, want, plain))
    assert np.square(fitted - want).mean() < 0.1 * np.square(plain - want).mean()


def test_equal_models_keep_the_weight() -> None:
    weight = W.T.reshape(8, 1, 8)
    for centred in (False, True):
        np.testing.assert_allclose(pair(U, centred=centred).target(weight), weight, atol=1e-4)


def test_the_shift_is_what_the_mean_lost() -> None:
    weight = W.T.reshape(8, 1, 8)
    found = pair(U * np.float32(0.9), centred=True)
    tensor = rtn.solve(weight, QuantScheme.parse("int4:b16"))
    want = X.mean(0) @ U @ W - X.mean(0) @ (U * 0.9) @ tensor.dequantize().reshape(8, 8).T
    np.testing.assert_allclose(found.shift(weight, tensor), want, atol=1e-4)


def test_rows_that_are_not_finite_are_left_out_of_both() -> None:
    before, after = two_models(U)
    found = readers({"w": [node for node in before.graph if node.outputs[0].name == "y"]})
    x = X.copy()
    x[3, 0] = np.inf
    got = paired_moments(before, after, found, Walks([{"x": x}]), first(before), centred=False)["w"]
    assert got.inputs.count == 511 and np.isfinite(got.whole.cross).all()


@pytest.mark.parametrize(("linear", "makes_up"), [(True, True), (False, False)])
def test_what_is_noise_to_the_other_half_changes_nothing(linear: bool, makes_up: bool) -> None:
    """x = x' M can be made up for; x = x' and independent noise cannot, though 48 rows fit 32 numbers well."""
    rng = np.random.default_rng(2)
    change = np.eye(32) + 0.2 * rng.normal(size=(32, 32))
    halves = []
    for _ in range(2):
        after = rng.normal(size=(48, 32))
        before = after @ change if linear else after + rng.normal(size=after.shape)
        halves.append(Sample((after.T @ after / 48)[None], (before.T @ after / 48)[None], 48))
    second, cross = (sum(getattr(half, name) for half in halves) / 2 for name in ("second", "cross"))
    zeros = np.zeros((1, 32))
    ones = np.ones((1, 32), np.float32)
    inputs = InputMoments(np.asarray(second, np.float32), 0 * ones, ones, ones, 96)
    found = Pair(inputs, Sample(second, cross, 96), tuple(halves), zeros, False)
    weight = rng.normal(size=(8, 1, 32)).astype(np.float32)
    target = found.target(weight)
    wanted = weight[:, 0] @ change.T if linear else weight[:, 0]
    got, plain = (np.square(each[:, 0] - wanted).sum() for each in (target, weight))
    assert got < 0.5 * plain if makes_up else (target == weight).all()


def test_how_huge_a_row_is_does_not_change_the_shift() -> None:
    """The first token of a language model: in full it would move the bias of all others."""
    weight = W.T.reshape(8, 1, 8)
    tensor = rtn.solve(weight, QuantScheme.parse("int4:b16"))
    before, after = two_models(U * np.float32(0.9))
    found = readers({"w": [node for node in before.graph if node.outputs[0].name == "y"]})
    shifts = []
    for size in (1e6, 1e8):
        x = X.copy()
        x[0] *= np.float32(size)
        got = paired_moments(before, after, found, Walks([{"x": x}]), first(before), centred=True)["w"]
        shifts.append(got.shift(weight, tensor))
    # Means of 512 rows in float32; each holds the huge row's share, up to 16 mean rows.
    np.testing.assert_allclose(*shifts, rtol=0, atol=1000 * np.finfo(np.float32).eps * np.abs(shifts[0]).max())


def test_a_deep_network_of_thin_layers_loses_less() -> None:
    depth = 12
    names = [f"w{index}" for index in range(depth)]
    body = "\n".join(f"a{i + 1} = MatMul(a{i}, w{i})\nb{i + 1} = Relu(a{i + 1})".replace(f"MatMul(a{i}", f"MatMul(b{i}")
                     for i in range(depth))  # fmt: skip
    rng = np.random.default_rng(1)
    weights = {name: (rng.normal(size=(8, 8)) / 2).astype(np.float32) for name in names}
    text = f"agraph (float[256, 8] b0) => (float[256, 8] b{depth}) {{ {body} }}"
    made = canonicalize(model(text, weights))
    feeds = [{"b0": rng.uniform(size=(256, 8)).astype(np.float32)} for _ in range(4)]
    other = {"b0": rng.uniform(size=(256, 8)).astype(np.float32)}
    want = evaluate(made, other)[f"b{depth}"]
    plan, kinds = driver.make_plan(made, options.from_arguments(bits=4, activations="float"), parse_target("reference"))
    errors = []
    for sequential in (False, True):
        method = Method("gptq", ("bias_correction",), sequential)
        solved = solve_weights(made, plan, kinds, method, feeds)
        got = evaluate(rewrite(solved.model, plan, solved.tensors, kinds), other)[f"b{depth}"]
        errors.append(float(np.square(got - want).mean()))
    assert errors[1] < 0.5 * errors[0]
