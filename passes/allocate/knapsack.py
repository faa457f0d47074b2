"""Multiple-choice knapsack: one choice a layer, least total value within a size limit, by dynamic programming.

Kellerer, Pferschy, Pisinger, Knapsack Problems, section 11.5. Sizes are counted in a unit: the greatest common divisor
of all size differences makes the result exact. Where the table would grow beyond `CELLS` the unit is larger and sizes
are rounded up, so that the limit still holds; the Lagrangian bound (section 11.2) then says how far from optimal the
result can be. The unit does not depend on the limit: a larger limit never gives a larger value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

CELLS = 1 << 26
_BOUND_STEPS = 100


@dataclass(frozen=True)
class Solution:
    """One choice a layer.

    Attributes:
        chosen: index of the choice of every layer.
        value: sum of the chosen values.
        size: sum of the chosen sizes, at most the limit.
        bound: no choice within the limit has a smaller value than this.
    """

    chosen: tuple[int, ...]
    value: float
    size: int
    bound: float

    @property
    def gap(self) -> float:
        """How far the value can be from the optimum, as a fraction of it; 0 when it is the optimum."""
        return 0.0 if self.value <= self.bound else (self.value - self.bound) / max(abs(self.bound), 1e-300)


def solve(
    values: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int, cells: int = CELLS
) -> Solution | None:
    """The best choice.

    Args:
        values: per layer the value of each choice, finite; less is better.
        sizes: the size of each choice, of the same shape.
        limit: most that the chosen sizes may sum up to.
        cells: entries of the table of the dynamic program.

    Returns:
        None when even the smallest choices exceed the limit.
    """
    smallest = [min(row) for row in sizes]
    room = limit - sum(smallest)
    if room < 0:
        return None
    extra = [[size - low for size in row] for row, low in zip(sizes, smallest, strict=True)]
    most = sum(max(row) for row in extra)
    exact = gcd(*(size for row in extra for size in row)) or 1
    unit = max(exact, -(-most * max(1, len(values)) // cells))
    steps = [[-(-size // unit) for size in row] for row in extra]
    chosen = _program(values, steps, min(room // unit, sum(max(row) for row in steps)))
    value = sum(row[index] for row, index in zip(values, chosen, strict=True))
    size = sum(row[index] for row, index in zip(sizes, chosen, strict=True))
    bound = value if unit == exact else min(value, _lagrangian_bound(values, sizes, limit))
    return Solution(tuple(chosen), value, size, bound)


def _program(values: Sequence[Sequence[float]], steps: Sequence[Sequence[int]], room: int) -> list[int]:
    """best[w] is the least value of the layers so far within w units; taken[layer, w] the choice that gives it."""
    best = np.zeros(room + 1)
    taken = np.zeros((len(values), room + 1), np.uint8)
    for layer, (row, sizes) in enumerate(zip(values, steps, strict=True)):
        found = np.full(room + 1, np.inf)
        for index in sorted(range(len(row)), key=lambda item: sizes[item]):
            start = sizes[index]
            if start > room:
                continue
            reached = best[: room + 1 - start] + row[index]
            better = reached < found[start:]
            found[start:][better] = reached[better]
            taken[layer, start:][better] = index
        best = found
    chosen, left = [0] * len(values), room
    for layer in reversed(range(len(values))):
        chosen[layer] = int(taken[layer, left])
        left -= steps[layer][chosen[layer]]
    return chosen


def _lagrangian_bound(values: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> float:
    """max over price >= 0 of sum over layers of min over choices of (value + price * size) - price * limit.

    Every price gives a lower bound; the function of the price is concave, so its sign of growth is followed.
    """

    def at(price: float) -> tuple[float, int]:
        total, used = 0.0, 0
        for row, weights in zip(values, sizes, strict=True):
            index = min(range(len(row)), key=lambda item: row[item] + price * weights[item])
            total += row[index] + price * weights[index]
            used += weights[index]
        return total - price * limit, used

    low, high = 0.0, 1.0
    best, used = at(low)
    while used > limit and high < 1e30:
        bound, used = at(high)
        best = max(best, bound)
        low, high = (high, high * 4) if used > limit else (low, high)
    for _ in range(_BOUND_STEPS):
        middle = (low + high) / 2
        bound, used = at(middle)
        best = max(best, bound)
        low, high = (middle, high) if used > limit else (low, middle)
    return best
