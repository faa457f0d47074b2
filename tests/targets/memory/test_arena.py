"""Where values lie: what lives at one time never overlaps, and little is left over."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from kbitc.targets.memory.arena import ALIGNMENT, Arena, Value, plan
from kbitc.targets.memory.bounds import Bound, Quantities
from tests.targets.memory.test_bounds import M, N


def places(arena: Arena, numbers: list[int]) -> list[int]:
    ends = [max(bound.at(numbers) for bound in sums) for sums in arena.offsets]
    return [-(-end // ALIGNMENT) * ALIGNMENT for end in ends]


def check(values: list[Value], arena: Arena, numbers: list[int]) -> None:
    """No two values that live at one time overlap, and all end inside."""
    offsets, sizes = places(arena, numbers), [value.size.at(numbers) for value in values]
    room = max(bound.at(numbers) for bound in arena.size)
    assert all(offset + size <= room for offset, size in zip(offsets, sizes, strict=True))
    for i, j in combinations(range(len(values)), 2):
        if values[i].first <= values[j].last and values[j].first <= values[i].last:
            assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]


def lives(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return [(i, i + int(random.integers(0, 6))) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_numbers_do_not_overlap(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = [Value(Bound.constant(int(random.integers(0, 5000))), *life) for life in lives(random, 40)]
    check(values, plan(values, [[]]), [])


@pytest.mark.parametrize("seed", range(5))
def test_symbolic_sizes_do_not_overlap_whatever_they_are(seed: int) -> None:
    random = np.random.default_rng(seed)
    quantities = Quantities()
    made = [N * 48, N * M * 4, N * N * 12, N * 4 + 100, M * M * M, 777]
    bounds = [quantities.bound(made[int(random.integers(0, len(made)))]) for _ in range(40)]
    count = len(quantities.expressions)
    values = [Value(bound, *life) for bound, life in zip(bounds, lives(random, 40), strict=True)]
    arena = plan(values, [[number] * count for number in (4, 64)])
    for numbers in product((1, 3, 50, 1000), repeat=count):
        check(values, arena, list(numbers))


def test_a_chain_takes_its_two_largest_neighbours() -> None:
    """640 and 1280 bytes live together; the offsets leave nothing over."""
    sizes = [64, 640, 1280, 64, 640]
    values = [Value(Bound.constant(size), i, i + 1) for i, size in enumerate(sizes)]
    assert max(bound.at([]) for bound in plan(values, [[]]).size) == 1920
