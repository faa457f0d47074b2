"""Budgets: their text, and that a result above one is never accepted, whatever the parts beside the weights do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kbitc import options
from kbitc.budget import Budget, make_budget, parse_drop, parse_size, parse_time
from kbitc.errors import AccuracyError, UnsupportedError, UsageError
from kbitc.kernel_times import KernelTimes, priced, within_time
from kbitc.passes.allocate.choices import Problem, stored_bytes, weight_bits
from kbitc.passes.verify.score import Score
from kbitc.planner import Fitting, smallest_within
from kbitc.quant.plan import QuantPlan
from tests.support import planned


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("20 MiB", 20 << 20), ("512kB", 512_000), ("1.5gb", 1_500_000_000), ("4096", 4096), (7, 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "20TBs", "0", "1e6", "20MB!"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "microseconds"), [("800us", 800), ("1.5ms", 1500), ("2 s", 2e6)])
def test_times(text: str, microseconds: float) -> None:
    assert parse_time(text) == pytest.approx(microseconds)
    for wrong in (text[:-1] + "h", "0" + text[-2:], text[0], f"-{text}"):
        with pytest.raises(UsageError, match="not a time"):
            parse_time(wrong)


def test_drops() -> None:
    assert parse_drop("0.5%") == pytest.approx(0.005) and parse_drop(0.01) == 0.01
    for text in ("0.5", "101%", "-1%", "half"):
        with pytest.raises(UsageError, match="percent"):
            parse_drop(text)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"target_bpw": 0.5}, "--target-bpw"),
        ({"target_bpw": float("nan")}, "--target-bpw"),
        ({"target_bpw": 4.0, "size_budget": "1MB"}, "give one"),
        ({"time_budget": "1ms", "size_budget": "1MB"}, "give one"),
        ({"time_budget": "1 minute"}, "not a time"),
        ({"metric": "top1"}, "--max-drop"),
        ({"labels": Path("x.npy")}, "--max-drop"),
        ({"allocate": "uniform"}, "goes with a budget"),
        ({"target_bpw": 4.0, "bits": 4}, "--bits"),
        ({"target_bpw": 4.0, "scheme": "float32"}, "float32"),
    ],
)
def test_options_that_contradict(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.from_arguments(**chosen)  # type: ignore[arg-type]


def _result(problem: Problem, plan: QuantPlan, seed: int) -> tuple[int, float]:
    """Size and bits a weight of a pretended result: beside the weights lies something that depends on the plan."""
    texts = tuple(str(entry.scheme) for entry in plan.entries)
    random = np.random.default_rng([seed, *(ord(letter) for text in texts for letter in text)])
    size = sum(stored_bytes(entry) for entry in plan.entries) + 1000 + int(random.integers(0, 600))
    return size, sum(weight_bits(entry) for entry in plan.entries) / problem.weights


@pytest.mark.parametrize("name", ["sensitivity", "uniform"])
def test_no_size_budget_is_ever_exceeded(name: str) -> None:
    problem = planned.problem()
    least, most = (sum(pick(c.stored for c in layer.choices) for layer in problem.layers) for pick in (min, max))
    outcomes = {"kept": 0, "refused": 0}
    for seed in range(200):
        budget = int(np.random.default_rng(seed).integers(least, most + 3000))
        guess = int(np.random.default_rng([seed, 1]).integers(0, 4000))
        try:
            size, attempts = _run(problem, Budget(size=budget, allocate=name), seed, guess)
        except UsageError:
            outcomes["refused"] += 1
            assert budget < least + 1600  # only where the smallest plan may not fit
            continue
        outcomes["kept"] += 1
        assert size <= budget and attempts <= 12
    assert outcomes["kept"] > 150 and outcomes["refused"] > 5


def _run(problem: Problem, budget: Budget, seed: int, guess: int) -> tuple[int, int]:
    planner = Fitting(problem, budget, lambda plan, counted: guess)
    for attempt in range(1, 100):
        size, bits = _result(problem, planner.plan, seed)
        if planner.accepts(size, bits):
            return size, attempt
    raise AssertionError("no end")


def test_bits_a_weight_are_never_exceeded_and_nearly_used() -> None:
    problem = planned.problem()
    for target in np.linspace(3.2, 9, 20):
        planner = Fitting(problem, make_budget(target_bpw=float(target)), lambda plan, counted: 0)
        bits = _result(problem, planner.plan, 0)[1]
        while not planner.accepts(0, bits):
            bits = _result(problem, planner.plan, 0)[1]
        assert target - 0.5 < bits <= target


def test_too_few_bits_are_refused_with_the_least() -> None:
    with pytest.raises(UsageError, match=r"below the smallest.*--target-bpw 1.5.*takes \d\.\d+ bits a weight"):
        Fitting(planned.problem(), Budget(bpw=1.5), lambda plan, counted: 0)


def _scored(drops: dict[int, float]) -> Callable[[QuantPlan], Score]:
    """A judge whose drop is that of the narrowest width of the plan."""

    def judge(plan: QuantPlan) -> Score:
        narrowest = min(entry.scheme.bits for entry in plan.entries if entry.scheme is not None)
        return Score("pretended", 1.0, 1 - drops[narrowest], drops[narrowest], 0.0, 1.0, 10, "none")

    return judge


DROPS = {2: 0.3, 3: 0.1, 4: 0.02, 5: 0.01, 6: 0.004, 7: 0.002, 8: 0.001}


@pytest.mark.parametrize(("limit", "width"), [(0.5, 2), (0.1, 3), (0.015, 5), (0.001, 8)])
def test_the_search_finds_the_narrowest_plan_that_keeps_the_drop(limit: float, width: int) -> None:
    budget = Budget(max_drop=limit, allocate="uniform")
    found = smallest_within(planned.problem(), budget, _scored(DROPS))
    assert {entry.scheme.bits for entry in found.plan.entries if entry.scheme is not None} == {width}
    assert found.summary()["score"]["drop"] <= limit


def test_a_drop_that_nothing_keeps_names_the_best_found_and_its_interval() -> None:
    with pytest.raises(AccuracyError, match=r"no plan keeps --max-drop.*0.05 %.*falls 0.10 %.*8.\d+ bits") as caught:
        smallest_within(planned.problem(), Budget(max_drop=0.0005, allocate="uniform"), _scored(DROPS))
    assert caught.value.exit_code == 6


def test_a_size_that_fits_must_keep_the_drop_as_well() -> None:
    problem = planned.problem()
    for limit, kept in ((0.5, True), (0.0001, False)):
        planner = Fitting(problem, Budget(bpw=4.9, max_drop=limit), lambda plan, counted: 0, _scored(DROPS))
        bits = _result(problem, planner.plan, 0)[1]
        if kept:
            while not planner.accepts(0, bits):
                bits = _result(problem, planner.plan, 0)[1]
            assert planner.summary()["score"]["drop"] <= limit
            continue
        with pytest.raises(AccuracyError, match="no plan keeps --max-drop"):
            while not planner.accepts(0, bits):
                bits = _result(problem, planner.plan, 0)[1]


def _times(target: str = "x86:avx512vnni") -> tuple[Problem, QuantPlan, KernelTimes]:
    """The allocation problem, the plan of 8 bits, and what its two products and convolutions take as predicted."""
    problem = planned.problem(target=target)
    widest = problem.plan([len(layer.choices) - 1 for layer in problem.layers])
    layers, kinds = {}, {"MatMul": "matmul", "Conv": "conv", "Gather": "embedding"}
    for entry in widest.entries:
        facts = {"rule": "integer_product", "kind": kinds[entry.op_type], "weight_shape": entry.shape, "bits": 8,
                 "activation": "int8"}  # fmt: skip
        layers |= {node: {**facts, "name": node, "out_shape": ["b", entry.shape[0]]} for node in entry.nodes}
    return problem, widest, KernelTimes(target, layers, {"b": 12})


def _unjudged(plan: QuantPlan) -> Score:
    raise AssertionError("nobody asked for a score")


def test_a_time_budget_is_kept_by_the_plan_of_least_noise() -> None:
    problem, widest, times = _times()
    noises = []
    least = sum(min(times.of(choice.entry) or 0.0 for choice in layer.choices) for layer in problem.layers)
    for asked in np.linspace(least + 0.01, times.total + 0.01, 4):
        budget = Budget(microseconds=float(asked))
        planner = within_time(problem, budget, times, widest, _unjudged)
        summary = planner.summary()
        took = sum(times.of(entry) or 0.0 for entry in planner.plan.entries)
        assert took == pytest.approx(summary["predicted_microseconds"], abs=0.05)
        assert took <= asked + 0.01
        noises.append(-summary["predicted_sqnr_db"])
    assert noises == sorted(noises, reverse=True) and noises[0] > noises[-1]


def test_a_time_that_no_plan_keeps_is_refused_with_the_least() -> None:
    problem, widest, times = _times()
    with pytest.raises(UsageError, match=r"quickest plan takes.*0.001us, \d[\d.]*us are predicted"):
        within_time(problem, Budget(microseconds=1e-3), times, widest, _unjudged)


def test_a_time_budget_needs_a_cost_model() -> None:
    problem, widest, times = _times()
    unknown = KernelTimes("reference", times.layers, times.sizes)
    with pytest.raises(UnsupportedError, match="cost model knows no product.*reference"):
        within_time(problem, Budget(microseconds=1e6), unknown, widest, _unjudged)
    assert priced(problem, unknown) is problem


def test_a_plan_within_the_time_must_keep_the_drop_as_well() -> None:
    problem, widest, times = _times()
    budget = Budget(microseconds=2 * times.total, max_drop=0.5)
    assert within_time(problem, budget, times, widest, _scored(DROPS)).summary()["score"]["drop"] <= 0.5
    with pytest.raises(AccuracyError, match="no plan keeps --max-drop"):
        within_time(problem, Budget(microseconds=2 * times.total, max_drop=1e-5), times, widest, _scored(DROPS))


def test_costs_are_what_the_target_takes_where_that_is_known() -> None:
    problem, _, times = _times()
    for before, layer in zip(problem.layers, priced(problem, times).layers, strict=True):
        kind = layer.candidate.kind
        expected = [0.0 if kind == "embedding" else times.of(choice.entry) for choice in before.choices]
        assert [choice.cost for choice in layer.choices] == expected
