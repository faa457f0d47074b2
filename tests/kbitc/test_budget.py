"""Budgets: their text, and that a result above one is never accepted, whatever the parts beside the weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kbitc import options
from kbitc.budget import Budget, make_budget, parse_drop, parse_size
from kbitc.errors import UsageError
from kbitc.passes.allocate.choices import Problem, stored_bytes, weight_bits
from kbitc.planner import Fitting
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
