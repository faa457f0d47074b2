"""What the kernels of a plan take on the target, by the cost model: for `--time-budget`, and to prefer cheap widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbitc import catalog
from kbitc.budget import Budget
from kbitc.errors import UnsupportedError, UsageError
from kbitc.passes.allocate.allocation import Allocate, Allocation
from kbitc.passes.allocate.choices import FLOAT_BITS, Problem
from kbitc.planner import ALLOCATORS, Planner, Settled, require
from kbitc.quant.plan import PlanEntry, QuantPlan

if TYPE_CHECKING:
    import onnx_ir as ir

    from kbitc.passes.verify.score import Score
    from kbitc.targets.target import Target

# Sizes of a knapsack are whole numbers: nanoseconds.
NANOSECONDS = 1000


@dataclass(frozen=True)
class KernelTimes:
    """Products of a plan as they were lowered once; other widths of a weight take the same rule at another width.

    Attributes:
        target: text form of the target.
        layers: node -> its entry of a report's `layers`.
        sizes: of symbolic dims, from the first sample.
    """

    target: str
    layers: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]

    def of(self, entry: PlanEntry) -> float | None:
        """Microseconds of the products that read a weight; None when the cost model does not know one of them."""
        from kbitc.targets.costs import predicted

        bits = FLOAT_BITS if entry.scheme is None else entry.scheme.bits
        total = 0.0
        for node in entry.nodes:
            facts = self.layers.get(f"{node}.channels_last") or self.layers.get(node)
            time = None if facts is None else predicted({**facts, "bits": bits}, self.target, self.sizes)
            if time is None:
                return None
            total += time
        return total

    @property
    def total(self) -> float:
        """Microseconds of all products that the cost model knows."""
        from kbitc.targets.costs import predicted

        return sum(predicted(facts, self.target, self.sizes) or 0.0 for facts in self.layers.values())


def kernel_times(model: ir.Model, target: Target, feeds: Mapping[str, Any]) -> KernelTimes:
    """Lower a model once.

    Args:
        model: after the rewrite of some plan of it.
        target: what is compiled for.
        feeds: one set of inputs; gives the sizes of symbolic dims.
    """
    from kbitc.targets.costs import sizes_of
    from kbitc.targets.lower.emitter import lower

    lowered = lower(model, target)
    layers = {layer["name"]: layer for layer in lowered.layers}
    return KernelTimes(target.name, layers, sizes_of(lowered.inputs, feeds))


def within_time(
    problem: Problem, budget: Budget, times: KernelTimes, base: QuantPlan, judge: Callable[[QuantPlan], Score]
) -> Planner:
    """The least noise among the plans whose products take at most `budget.microseconds`, as the cost model predicts.

    Args:
        problem: the choices.
        budget: has `microseconds`.
        times: of the base plan.
        base: the plan without a budget.
        judge: scores a plan, for `max_drop`.

    Raises:
        UnsupportedError: the cost model knows none of the products.
        UsageError: the quickest plan takes longer.
        AccuracyError: the score falls further than `max_drop`.
    """
    asked = budget.microseconds or 0.0
    entries = {entry.tensor: entry for entry in base.entries}
    tables = [[times.of(choice.entry) for choice in layer.choices] for layer in problem.layers]
    if all(time is None for row in tables for time in row):
        raise UnsupportedError("the cost model knows no product of this model", where=f"target {times.target}",
                               remedy="use --target-bpw or --size-budget")  # fmt: skip
    sizes = [[round(NANOSECONDS * (time or 0.0)) for time in row] for row in tables]
    movable = sum(times.of(entries[layer.candidate.tensor]) or 0.0 for layer in problem.layers)
    rest = max(0.0, times.total - movable)
    limit, least = round(NANOSECONDS * (asked - rest)), rest + sum(map(min, sizes)) / NANOSECONDS
    found = None
    if sum(map(min, sizes)) <= limit:
        allocate: Allocate = catalog.find(ALLOCATORS, budget.allocate, "allocator").make(problem)
        found = allocate(sizes, limit)
    if found is None:
        raise UsageError("the budget is below what the quickest plan takes",
                         got=f"--time-budget {asked:g}us, {least:.4g}us are predicted",
                         remedy="raise it, or see `kbitc bench --layers`")  # fmt: skip
    plan = problem.plan(found.chosen)
    facts = _facts(budget, found, rest + found.size / NANOSECONDS)
    if budget.max_drop is not None:
        score = judge(plan)
        bits = sum(layer.choices[index].bits for layer, index in zip(problem.layers, found.chosen, strict=True))
        require(score, budget, (bits + problem.fixed_bits) / max(1, problem.weights))
        facts |= {"max_drop": budget.max_drop, "score": score.as_json()}
    return Settled(plan, facts)


def _facts(budget: Budget, found: Allocation, microseconds: float) -> dict[str, Any]:
    return {
        "allocator": budget.allocate, "time_budget_microseconds": budget.microseconds,
        "predicted_microseconds": round(microseconds, 2), "predicted_sqnr_db": found.sqnr_db, "gap": found.gap,
    }  # fmt: skip


def priced(problem: Problem, times: KernelTimes) -> Problem:
    """The problem with predicted microseconds as costs; as it is where nothing is predicted."""
    costs: Sequence[Sequence[float | None]] = [
        [times.of(choice.entry) for choice in layer.choices] for layer in problem.layers
    ]
    if all(cost is None for row in costs for cost in row):
        return problem
    return problem.priced([[cost or 0.0 for cost in row] for row in costs])
