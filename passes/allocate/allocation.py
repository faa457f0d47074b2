"""What an allocator answers, and the step that allocators which know each choice's noise share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kbitc.passes.allocate.choices import Problem
from kbitc.passes.allocate.knapsack import Solution, solve

Sizes = Sequence[Sequence[int]]
# Predicted noise that is given away for cheaper kernels, as a fraction: far below what the prediction is worth.
KERNEL_SLACK = 0.01


@dataclass(frozen=True)
class Allocation:
    """One choice a layer, and what is known of it.

    Attributes:
        chosen: index of the choice of every layer of the problem.
        size: sum of the sizes that were given.
        noise: predicted noise to signal at the outputs, the sum over the layers; None where none is predicted.
        gap: how far from the least predicted noise this can be, as a fraction of it.
    """

    chosen: tuple[int, ...]
    size: int
    noise: float | None = None
    gap: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """The predicted noise in dB."""
        return None if not self.noise else -10 * math.log10(self.noise)


Allocate = Callable[[Sizes, int], "Allocation | None"]


def by_noise(problem: Problem, noise: Sequence[Sequence[float]]) -> Allocate:
    """Least noise within the limit; among choices within `KERNEL_SLACK` of it, cheaper kernels.

    The second knapsack minimises noise + price * cost with price = slack * least / (most cost - least cost). Its
    result x and the first one's y have noise(x) <= noise(y) + price * (cost(y) - cost(x)) <= (1 + slack) * least.
    """
    costs = [[choice.cost for choice in layer.choices] for layer in problem.layers]
    spread = sum(max(row) - min(row) for row in costs)

    def allocate(sizes: Sizes, limit: int) -> Allocation | None:
        best = solve(noise, sizes, limit)
        if best is None:
            return None
        price = KERNEL_SLACK * best.value / spread if spread else 0.0
        priced = [
            [value + price * cost for value, cost in zip(row, prices, strict=True)]
            for row, prices in zip(noise, costs, strict=True)
        ]
        cheaper = solve(priced, sizes, limit) if price else None
        chosen = best.chosen if cheaper is None else cheaper.chosen
        return _allocation(chosen, sizes, noise, best)

    return allocate


def _allocation(chosen: tuple[int, ...], sizes: Sizes, noise: Sequence[Sequence[float]], best: Solution) -> Allocation:
    value = sum(row[index] for row, index in zip(noise, chosen, strict=True))
    size = sum(row[index] for row, index in zip(sizes, chosen, strict=True))
    gap = (value - best.bound) / best.bound if best.bound > 0 and value > best.bound else 0.0
    return Allocation(chosen, size, value, gap)
