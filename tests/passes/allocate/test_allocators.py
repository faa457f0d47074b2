"""What each allocator answers, and the counts that it decides by."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from kbitc import catalog
from kbitc.bundle.weights import ALIGNMENT, padded_size
from kbitc.graph.evaluate import Session
from kbitc.options import Method
from kbitc.passes.allocate import choices
from kbitc.passes.allocate.allocation import KERNEL_SLACK, by_noise
from kbitc.passes.allocate.allocators import second_order, sensitivity
from kbitc.passes.allocate.choices import Problem, stored_bytes, weight_bits
from kbitc.passes.allocate.knapsack import solve
from kbitc.passes.allocate.probe import Probe
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.planner import ALLOCATORS
from kbitc.quant.metrics import compare
from kbitc.quant.tensor import QTensor
from kbitc.targets.lower.emitter import lower
from kbitc.targets.target import parse_target
from tests.support import planned

NAMES = ["second_order", "sensitivity", "uniform"]


def _bits(problem: Problem) -> list[list[int]]:
    return [[choice.bits for choice in layer.choices] for layer in problem.layers]


def _solved(problem: Problem, chosen: tuple[int, ...]) -> dict[str, QTensor]:
    found = {}
    for layer, index in zip(problem.layers, chosen, strict=True):
        scheme = layer.choices[index].entry.scheme
        assert scheme is not None
        found[layer.candidate.tensor] = problem.quantize(problem.weight(layer), scheme)
    return found


def test_every_allocator_is_found_by_its_file() -> None:
    assert catalog.names(ALLOCATORS) == NAMES


def test_alignment_is_that_of_the_weights_file() -> None:
    assert choices.ALIGNMENT == ALIGNMENT


@pytest.mark.parametrize("scheme", ["int4:b32", "uint4:b16:f32", "int4:c", "nf4:b64"])
def test_the_choices_are_all_widths_of_the_format(scheme: str) -> None:
    problem = planned.problem(scheme)
    widths = [[choice.entry.scheme.bits for choice in layer.choices if choice.entry.scheme] for layer in problem.layers]
    assert widths == [list(range(2, 8 if scheme.startswith("nf") else 9))] * 6


@pytest.mark.parametrize("scheme", ["int4:b32", "uint4:b16:f32", "uint4:b32:min", "int4:c", "int4:t", "nf4:b64"])
def test_counted_bits_are_those_of_the_quantized_weight(scheme: str) -> None:
    problem = planned.problem(scheme)
    for index in range(6):
        for name, tensor in _solved(problem, (index,) * 6).items():
            entry = next(e for e in problem.plan((index,) * 6).entries if e.tensor == name)
            assert weight_bits(entry) == round(tensor.bits_per_weight() * tensor.codes.size)


@pytest.mark.parametrize("target", ["x86:avx2", "arm-neon:dotprod"])
@pytest.mark.parametrize("activation", ["int8", "float32"])
@pytest.mark.parametrize(
    "scheme", ["int4:b32", "uint4:b16:f32", "uint4:b16:min", "uint4:c:min:f32", "int4:c", "int4:t"]
)
def test_counted_bytes_are_those_of_the_lowered_arrays(target: str, activation: str, scheme: str) -> None:
    problem = planned.problem(scheme, activation, target)
    kinds = {layer.candidate.tensor: layer.candidate.kind for layer in problem.layers}
    for index in (0, 1, 5):
        plan = problem.plan((index,) * 6)
        quantized = rewrite(
            problem.model, plan, solve_weights(problem.model, plan, kinds, Method("rtn")).tensors, kinds
        )
        stored = lower(quantized, parse_target(target)).weights
        parts = (".codes", ".scales", ".zero_points", ".offsets")
        for entry in plan.entries:
            prefixes = tuple(f"{node}." for node in entry.nodes)
            arrays = [array for name, array in stored.items() if name.startswith(prefixes) and name.endswith(parts)]
            assert stored_bytes(entry) == sum(padded_size(array.nbytes) for array in arrays), entry


def test_a_pinned_weight_keeps_its_entry() -> None:
    problem = planned.problem(pinned=("first", "stem"))
    assert [layer.candidate.tensor for layer in problem.layers] == ["deep", "point", "table", "second"]
    entries = {entry.tensor: entry for entry in problem.plan((0, 0, 0, 0)).entries}
    assert list(entries) == list(planned.SHAPES)
    assert str(entries["first"].scheme) == "int4:b32" and str(entries["second"].scheme) == "int2:b32"
    assert problem.weights == sum(prod(shape) for shape in planned.SHAPES.values())
    assert problem.fixed_bits == weight_bits(entries["first"]) + weight_bits(entries["stem"])


@pytest.mark.parametrize("name", NAMES)
def test_an_allocation_keeps_every_limit_and_takes_all_when_it_may(name: str) -> None:
    problem = planned.problem()
    sizes, allocate = _bits(problem), catalog.find(ALLOCATORS, name, "allocator").make(problem)
    least, most = (sum(pick(row) for row in sizes) for pick in (min, max))
    assert allocate(sizes, least - 1) is None
    for limit in np.linspace(least, most, 12):
        found = allocate(sizes, int(limit))
        assert found is not None and found.size <= int(limit)
        assert found.size == sum(row[i] for row, i in zip(sizes, found.chosen, strict=True))


@pytest.mark.parametrize("name", ["second_order", "sensitivity"])
def test_more_bits_never_predict_more_noise_than_the_kernel_slack(name: str) -> None:
    problem = planned.problem()
    sizes, allocate = _bits(problem), catalog.find(ALLOCATORS, name, "allocator").make(problem)
    least, most = (sum(pick(row) for row in sizes) for pick in (min, max))
    noises = [found.noise for limit in range(least, most, 97) if (found := allocate(sizes, limit)) is not None]
    assert len(noises) > 20
    for before, after in zip(noises, noises[1:], strict=False):
        assert before is not None and after is not None and after <= before * (1 + KERNEL_SLACK)


def test_cheaper_kernels_are_taken_within_the_slack_and_not_beyond() -> None:
    problem = planned.problem()
    layer = problem.layers[0]
    small = replace(problem, layers=(layer,) * 3)
    seven, eight = 5, 6
    assert layer.choices[seven].cost < layer.choices[eight].cost
    sizes = [[0] * 7] * 3
    close = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0001]
    found = by_noise(small, [close] * 3)(sizes, 0)
    assert found is not None and found.chosen == (0, 0, 0)  # equal noise: the narrowest is the quickest
    far = [9.0, 9.0, 9.0, 9.0, 9.0, 1.1, 1.0]
    found = by_noise(small, [far] * 3)(sizes, 0)
    best = solve([far] * 3, sizes, 0)
    assert found is not None and best is not None and found.chosen == best.chosen == (eight,) * 3


def test_measured_noise_is_that_of_the_model_with_this_weight_alone() -> None:
    problem = planned.problem()
    table = sensitivity.measure(problem)
    for layer, row in zip(problem.layers, table, strict=True):
        name, scheme = layer.candidate.tensor, layer.choices[1].entry.scheme
        assert scheme is not None
        tensor = problem.quantize(problem.weight(layer), scheme)
        plan = replace(problem.plan((1,) * 6), entries=(replace(layer.choices[1].entry, activation="float32"),))
        alone = rewrite(problem.model, plan, {name: tensor}, {name: layer.candidate.kind})
        original, found = ([Session(model).run(feed) for feed in problem.feeds] for model in (problem.model, alone))
        ratios = [10 ** (-item.sqnr_db / 10) if item.max_error else 0.0 for item in compare(original, found).values()]
        assert row[1] == pytest.approx(np.mean(ratios), rel=1e-4), name


def test_the_second_order_estimate_is_the_trace_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last weight acts linearly, z = r W, so the noise of d is sum |r d|^2 and Tr(J^T J) / n = sum r^2 / rows of W.

    The mean over random signs of 24 columns and 400 probes has a relative deviation of at most sqrt(2 / 9600).
    """
    monkeypatch.setattr(second_order, "PROBES", 400)
    problem = planned.problem()
    last = replace(problem, layers=problem.layers[-1:])
    sessions = Session(problem.model, [problem.layers[-1].candidate.nodes[0].inputs[0].name])
    results = [sessions.run(feed) for feed in problem.feeds]
    energy = sum(float(np.square(item[sessions.outputs[-1]], dtype=np.float64).sum()) for item in results)
    signal = sum(float(np.square(item["z"], dtype=np.float64).sum()) for item in results)
    weight = problem.weight(last.layers[0])
    for choice, found in zip(last.layers[0].choices, second_order.estimate(last)[0], strict=True):
        assert choice.entry.scheme is not None
        error = weight - problem.quantize(weight, choice.entry.scheme).dequantize()
        squares = float(np.square(error, dtype=np.float64).sum())
        outputs = 2  # the noise is the mean over both, and the other one does not change
        expected = energy / weight.shape[2] * squares / signal / outputs
        assert found == pytest.approx(expected, rel=5 * (2 / 9600) ** 0.5)


def test_a_probe_leaves_the_model_and_gives_no_noise_for_its_own_weights() -> None:
    problem = planned.problem()
    before = list(problem.model.graph.initializers)
    kinds = {layer.candidate.tensor: layer.candidate.kind for layer in problem.layers}
    probe = Probe(problem.model, kinds, problem.feeds)
    assert probe.noise({}) == 0.0
    layer = problem.layers[-1]
    assert probe.noise({layer.candidate.tensor: problem.weight(layer)}) == 0.0
    assert probe.noise({layer.candidate.tensor: 2 * problem.weight(layer)}) == pytest.approx(0.5)
    assert list(problem.model.graph.initializers) == before and len(problem.model.graph.inputs) == 2
