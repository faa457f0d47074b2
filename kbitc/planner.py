"""Stage 5 with a budget: plans until the result, counted as it lies on disk, keeps it.

::

    planner = make_planner(...)
    while True:
        size = produce(planner.plan)
        if planner.accepts(size, bits_per_weight):
            break

A budget is never exceeded because what decides is not a prediction but the count of the finished result, before it is
published. The prediction (`kbitc.passes.allocate.choices.stored_bytes` and what was beside the weights the last time)
only keeps the number of attempts small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kbitc import catalog
from kbitc.budget import Budget
from kbitc.errors import AccuracyError, InternalError, UsageError
from kbitc.passes.allocate.allocation import Allocate, Allocation, Sizes
from kbitc.passes.allocate.choices import Problem
from kbitc.quant.plan import QuantPlan

if TYPE_CHECKING:
    import onnx_ir as ir

    from kbitc.passes.verify.score import Score
    from kbitc.targets.target import Target

ALLOCATORS = "kbitc.passes.allocate.allocators"
SOLVERS = "kbitc.passes.solvers"
# Sensitivities are measured with the quickest solver: the order of the layers is what counts.
MEASURED_WITH = "rtn"
# A plan that leaves less than this fraction of a budget unused is taken as it is.
SLACK = 0.02
# Attempts after which a plan that fits is taken as it is.
ATTEMPTS = 4
# A search for the smallest plan ends within so many bits a weight.
RESOLUTION = 0.05
# Of a bundle, about: machine code of a kernel, text about a parameter and about a layer, and what is always there.
KERNEL_BYTES = 17_000
PARAMETER_TEXT = 400
LAYER_TEXT = 2_000
BASE_BYTES = 40_000


class Planner(Protocol):
    """Gives plans until one is accepted."""

    plan: QuantPlan

    def accepts(self, size: int, bits_per_weight: float) -> bool:
        """Whether the result of the plan keeps the budget; when not, `plan` is another one now."""

    def summary(self) -> Mapping[str, Any]:
        """What the report says of the planning."""


@dataclass
class Settled:
    """A plan that is carried out whatever it takes."""

    plan: QuantPlan
    facts: Mapping[str, Any] = field(default_factory=dict)

    def accepts(self, size: int, bits_per_weight: float) -> bool:
        """Always."""
        return True

    def summary(self) -> Mapping[str, Any]:
        """The given facts."""
        return self.facts


class Fitting:
    """Plans for `--size-budget` or `--target-bpw`.

    Args:
        problem: the choices.
        budget: has `size` or `bpw`.
        others: bytes of the result beside the counted weights of a plan, estimated; not used for `bpw`.
        judge: scores a plan, for `max_drop`.
    """

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        others: Callable[[QuantPlan, int], int],
        judge: Callable[[QuantPlan], Score] | None = None,
    ) -> None:
        self._problem, self._budget, self._judge = problem, budget, judge
        self._scores: dict[tuple[int, ...], Score] = {}
        self._allocate: Allocate = catalog.find(ALLOCATORS, budget.allocate, "allocator").make(problem)
        self._sizes = sizes_of(problem, budget)
        self._attempts = 0
        self._fitted: Allocation | None = None
        self._allocation = self._first(others)
        self.plan = problem.plan(self._allocation.chosen)

    def accepts(self, size: int, bits_per_weight: float) -> bool:
        """Judge the finished result.

        Raises:
            UsageError: when nothing smaller is left to try.
            AccuracyError: when its score falls further than `max_drop`.
        """
        self._attempts += 1
        asked, actual = self._asked(size, bits_per_weight)
        tried = self._allocation
        chosen = self._larger(tried, asked, actual) if actual <= asked else self._smaller(tried, asked, actual)
        self._allocation, self.plan = chosen, self._problem.plan(chosen.chosen)
        accepted = actual <= asked and chosen.chosen == tried.chosen
        if accepted and self._budget.max_drop is not None:
            require(self._score(), self._budget, bits_per_weight)
        return accepted

    def _score(self) -> Score | None:
        """Score of the current plan, measured once."""
        key = self._allocation.chosen
        if self._judge is not None and key not in self._scores:
            self._scores[key] = self._judge(self.plan)
        return self._scores.get(key)

    def summary(self) -> Mapping[str, Any]:
        """Allocator, what was asked and predicted, and how far from optimal it can be."""
        score = self._score()
        return {
            **({} if score is None else {"max_drop": self._budget.max_drop, "score": score.as_json()}),
            "allocator": self._budget.allocate,
            "size_budget": self._budget.size,
            "target_bpw": self._budget.bpw,
            "predicted_sqnr_db": self._allocation.sqnr_db,
            "gap": self._allocation.gap,
        }

    def _asked(self, size: int, bits_per_weight: float) -> tuple[int, int]:
        """(budget, what the result takes), in the unit of the sizes."""
        if self._budget.size is not None:
            return self._budget.size, size
        weights = self._problem.weights
        return int((self._budget.bpw or 0) * weights), round(bits_per_weight * weights)

    def _first(self, others: Callable[[QuantPlan, int], int]) -> Allocation:
        smallest = self._smallest()
        if self._budget.size is None:
            limit = self._asked(0, 0.0)[0] - self._problem.fixed_bits
            found = self._allocate(self._sizes, limit)
            if found is None:
                least = (smallest.size + self._problem.fixed_bits) / max(1, self._problem.weights)
                raise too_small(self._budget, f"{least:.3f} bits a weight")
            return found
        guess = self._allocate(self._sizes, self._budget.size) or smallest
        found = self._allocate(self._sizes, self._budget.size - others(self._problem.plan(guess.chosen), guess.size))
        return found or smallest

    def _smallest(self) -> Allocation:
        chosen = tuple(min(range(len(row)), key=row.__getitem__) for row in self._sizes)
        return Allocation(chosen, sum(row[index] for row, index in zip(self._sizes, chosen, strict=True)))

    def _larger(self, tried: Allocation, asked: int, actual: int) -> Allocation:
        """What the unused rest of the budget could buy; the same allocation when that is not worth an attempt."""
        first = self._fitted is None
        self._fitted = tried
        if not first or self._attempts >= ATTEMPTS or asked - actual <= SLACK * asked:
            return tried
        return self._allocate(self._sizes, tried.size + asked - actual) or tried

    def _smaller(self, tried: Allocation, asked: int, actual: int) -> Allocation:
        """The plan that is known to fit, else one that is smaller by the excess, and by more at every attempt."""
        if self._fitted is not None:
            return self._fitted
        smallest = self._smallest()
        if tried.chosen == smallest.chosen:
            raise too_small(self._budget, f"{actual} bytes" if self._budget.size else f"{actual} bits")
        excess = (actual - asked) * (1 + self._attempts // 2)
        return self._allocate(self._sizes, min(tried.size - excess, tried.size - 1)) or smallest


def sizes_of(problem: Problem, budget: Budget) -> Sizes:
    """The size of every choice in the unit of the budget: stored bytes, else bits."""
    if budget.size is not None:
        return [[choice.stored for choice in layer.choices] for layer in problem.layers]
    return [[choice.bits for choice in layer.choices] for layer in problem.layers]


def too_small(budget: Budget, least: str) -> UsageError:
    """The refusal of a budget that no plan keeps."""
    asked = f"--size-budget {budget.size}" if budget.size is not None else f"--target-bpw {budget.bpw:g}"
    return UsageError("the budget is below the smallest result", got=f"{asked}, the smallest takes {least}",
                      remedy="raise it, exclude fewer weights, or use larger blocks")  # fmt: skip


def smallest_within(problem: Problem, budget: Budget, judge: Callable[[QuantPlan], Score]) -> Settled:
    """The fewest bits whose score falls at most `max_drop`, by bisection over the bits a weight.

    Raises:
        AccuracyError: when not even the widest plan keeps it; names the best that was found.
    """
    allocate: Allocate = catalog.find(ALLOCATORS, budget.allocate, "allocator").make(problem)
    sizes = [[choice.bits for choice in layer.choices] for layer in problem.layers]
    weights = max(1, problem.weights)
    scores: dict[tuple[int, ...], Score] = {}

    def measured(limit: int) -> tuple[Allocation, Score, float]:
        found = allocate(sizes, limit)
        if found is None:
            raise InternalError("an allocator refuses a limit that the narrowest choices keep", got=limit)
        if found.chosen not in scores:
            scores[found.chosen] = judge(problem.plan(found.chosen))
        return found, scores[found.chosen], (found.size + problem.fixed_bits) / weights

    low, high = (sum(pick(row) for row in sizes) for pick in (min, max))
    tried = [measured(high)]
    best = tried[0]
    while best[1].drop <= (budget.max_drop or 0.0) and high - low > RESOLUTION * weights:
        middle = low if len(tried) == 1 else (low + high) // 2
        tried.append(measured(middle))
        if tried[-1][1].drop <= (budget.max_drop or 0.0):
            best, high = tried[-1], min(middle, tried[-1][0].size)
        else:
            low = middle + 1
    best = best if best[1].drop <= (budget.max_drop or 0.0) else min(tried, key=lambda item: item[1].drop)
    require(best[1], budget, best[2])
    facts = {
        "allocator": budget.allocate, "max_drop": budget.max_drop, "predicted_sqnr_db": best[0].sqnr_db,
        "gap": best[0].gap, "plans_tried": len(scores), "score": best[1].as_json(),
    }  # fmt: skip
    return Settled(problem.plan(best[0].chosen), facts)


def require(score: Score | None, budget: Budget, bits_per_weight: float) -> None:
    """Hold a score to --max-drop.

    Raises:
        AccuracyError: it falls further; says how far, with its interval.
    """
    if score is None or budget.max_drop is None or score.drop <= budget.max_drop:
        return
    found = f"the best found: {score} at {bits_per_weight:.2f} bits a weight"
    raise AccuracyError(
        "no plan keeps --max-drop", got=f"{100 * budget.max_drop:g} %", remedy=f"{found}; allow more, or use --exclude"
    )


def estimate_others(quantized: Callable[[QuantPlan], ir.Model], target: Target, plan: QuantPlan, counted: int) -> int:
    """Bytes of a bundle beside the counted weights, about: other parameters, library, report and manifest.

    Args:
        quantized: carries a plan out.
        target: what is compiled for.
        plan: the plan.
        counted: bytes of its weights as `stored_bytes` counts them.
    """
    from kbitc.bundle.weights import padded_size
    from kbitc.targets.lower.emitter import lower

    lowered = lower(quantized(plan), target)
    parameters = sum(padded_size(array.nbytes) for array in lowered.weights.values())
    kernels = len(lowered.module.get_global_vars())
    texts = len(lowered.weights) * PARAMETER_TEXT + len(lowered.layers) * LAYER_TEXT
    return max(0, parameters - counted) + kernels * KERNEL_BYTES + texts + BASE_BYTES
