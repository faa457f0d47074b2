"""Layers alone, values along the graph, histograms, and errors against step^2 / 12."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.options import Method
from kbitc.passes.allocate.allocators import sensitivity
from kbitc.passes.analyze.layers import analyze_layers, count, noise_db, theoretical_noise, weight_histogram
from kbitc.passes.analyze.matching import activation_histogram, first_departure, match, watched
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.passes.solvers import rtn
from kbitc.quant.scheme import QuantScheme
from tests.support import planned


@pytest.mark.parametrize("scheme", ["int4:b32", "uint3:b16", "int8:c", "int5:t"])
def test_theory_is_the_square_of_the_step_over_twelve_for_uniform_grids(scheme: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 2, 40)).astype(np.float32)
    tensor = rtn.solve(weight, QuantScheme.parse(scheme))
    steps = np.broadcast_to(np.repeat(tensor.scales, tensor.block, axis=2)[:, :, :40], weight.shape)
    assert theoretical_noise(tensor) == pytest.approx(float(np.square(steps, dtype=np.float64).sum()) / 12)


def test_the_error_of_uniform_numbers_is_the_theoretical_one() -> None:
    """200,000 numbers uniform over whole cells: squares of their errors have relative deviation sqrt(4/5) each."""
    weight = np.random.default_rng(1).uniform(-7.5, 7.5, (500, 1, 400)).astype(np.float32)
    weight[:, :, 0] = 7.5
    scale = np.full((500, 1, 1), 1.0, np.float32)
    tensor = rtn.solve(weight, QuantScheme.parse("int4:c:f32"))
    tensor = type(tensor)(tensor.format.encode(weight), scale, None, tensor.format, tensor.scheme)
    error = float(np.square(weight[:, :, 1:] - tensor.dequantize()[:, :, 1:], dtype=np.float64).sum())
    theory = theoretical_noise(tensor) * 399 / 400
    assert error == pytest.approx(theory, rel=5 * (0.8 / 199_500) ** 0.5 + 1 / 200)


def test_cells_of_a_table_are_as_wide_as_the_gaps_around_their_level() -> None:
    tensor = rtn.solve(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 1, 32), QuantScheme.parse("nf2:c:f32"))
    levels = np.array(tensor.format.levels, np.float64)
    low, middle, high = levels[1] - levels[0], (levels[2:] - levels[:-2]) / 2, levels[-1] - levels[-2]
    widths = np.array([low, *middle, high])
    expected = (np.square(widths)[tensor.codes] * np.square(tensor.scales.astype(np.float64))).sum() / 12
    assert theoretical_noise(tensor) == pytest.approx(float(expected))


def test_histograms_count_every_finite_value_once() -> None:
    found = count(np.array([-9.0, 0.0, 0.5, 9.0, np.nan, np.inf]), -1, 1)
    assert sum(found.counts) == 4 and found.counts[0] == found.counts[-1] == 1
    weight = np.random.default_rng(0).normal(size=(4, 1, 48)).astype(np.float32)
    made, levels = weight_histogram(weight, rtn.solve(weight, QuantScheme.parse("uint4:b16")))
    assert sum(made.counts) == weight.size and levels == tuple(range(-8, 8))


def test_activations_are_seen_in_steps_of_their_block() -> None:
    array = np.zeros((2, 40), np.float32)
    array[0, :16], array[0, 16:32], array[1, 39] = 5.0, 0.001, -3.0
    found = activation_histogram(array, -1, 16)
    assert (found.low, found.high) == (-128, 128) and sum(found.counts) == array.size
    assert sum(found.counts[-2:]) == 32 and sum(found.counts[:2]) == 1
    plain = activation_histogram(array, -1, 0)
    assert (plain.low, plain.high) == (-3.0, 5.0)


def test_a_layer_left_out_wins_what_its_noise_costs() -> None:
    problem = planned.problem("int4:b32")
    kinds = {layer.candidate.tensor: layer.candidate.kind for layer in problem.layers}
    tensors = solve_weights(problem.model, problem.plan((2,) * 6), kinds, Method("rtn")).tensors
    layers, together = analyze_layers(problem, tensors, sensitivity.measure(problem))
    assert [item.entry.tensor for item in layers] == list(planned.SHAPES)
    for item in layers:
        assert item.alone_db[4] == noise_db(item.noise)
        assert item.bits_per_weight > 4 and item.peak_to_rms > 1
        assert noise_db(together) < 60
    # One weight after another, the outputs y and z do not share any: leaving all of one side out leaves the other.
    assert max(item.exclusion_db for item in layers) > 0.5


def test_equal_models_match_everywhere_and_a_broken_weight_departs_there() -> None:
    problem = planned.problem("int8:b32", "float32")
    kinds = {layer.candidate.tensor: layer.candidate.kind for layer in problem.layers}
    plan = problem.plan((6,) * 6)
    matches, _ = match(problem.model, problem.model.clone(), plan, problem.feeds)
    assert {item.sqnr_db for item in matches} == {200.0} and first_departure(matches) is None
    tensors = solve_weights(problem.model, plan, kinds, Method("rtn")).tensors
    broken = rtn.solve(0 * problem.weight(problem.layers[2]), QuantScheme.parse("int8:b32"))
    quantized = rewrite(problem.model, plan, {**tensors, "point": broken}, kinds)
    matches, activations = match(problem.model, quantized, plan, problem.feeds)
    found = first_departure(matches)
    assert found is not None and found.node == "conv2" and found.sqnr_db == pytest.approx(0.0, abs=1e-6)
    assert set(activations) == {"stem", "deep", "point", "first", "second"}


def test_watched_values_are_in_graph_order_and_end_with_the_outputs() -> None:
    names = [node.name for node in watched(planned.model())]
    assert names == ["conv0", "conv1", "conv2", "gather3", "matmul4", "matmul6"]
