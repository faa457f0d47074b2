"""The knapsack against trying everything, its bound, and that more room never hurts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from kbitc.passes.allocate.knapsack import solve

Table = list[list[float]]


def _random(seed: int, layers: int = 5, choices: int = 4) -> tuple[Table, list[list[int]]]:
    random = np.random.default_rng(seed)
    counts = random.integers(1, choices + 1, layers)
    values = [sorted(random.uniform(0, 10, count), reverse=True) for count in counts]
    sizes = [sorted(int(size) for size in random.integers(1, 60, count)) for count in counts]
    return [[float(value) for value in row] for row in values], sizes


def _best(values: Table, sizes: list[list[int]], limit: int) -> float | None:
    fitting = [
        sum(row[i] for row, i in zip(values, chosen, strict=True))
        for chosen in product(*(range(len(row)) for row in values))
        if sum(row[i] for row, i in zip(sizes, chosen, strict=True)) <= limit
    ]
    return min(fitting) if fitting else None


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    values, sizes = _random(seed)
    for limit in range(0, sum(max(row) for row in sizes) + 20, 7):
        found, best = solve(values, sizes, limit), _best(values, sizes, limit)
        if best is None:
            assert found is None
            continue
        assert found is not None and found.size <= limit and found.gap == 0.0
        assert found.value == pytest.approx(best, rel=1e-12)
        assert found.size == sum(row[i] for row, i in zip(sizes, found.chosen, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_table_keeps_the_limit_and_says_how_good_it_is(seed: int) -> None:
    values, sizes = _random(seed, layers=6)
    for limit in range(sum(min(row) for row in sizes), sum(max(row) for row in sizes), 11):
        found, best = solve(values, sizes, limit, cells=80), _best(values, sizes, limit)
        assert found is not None and best is not None and found.size <= limit
        assert found.bound <= best + 1e-9
        assert found.value <= best * (1 + found.gap) + 1e-9


@pytest.mark.parametrize("cells", [80, 1 << 20])
def test_more_room_never_gives_a_larger_value(cells: int) -> None:
    values, sizes = _random(3, layers=6)
    found = [solve(values, sizes, limit, cells) for limit in range(30, 300)]
    known = [item.value for item in found if item is not None]
    assert known == sorted(known, reverse=True) and len(set(known)) > 3


def test_a_limit_below_the_smallest_choices_has_no_solution() -> None:
    assert solve([[1.0], [1.0]], [[10], [20]], 29) is None
    found = solve([[1.0], [1.0]], [[10], [20]], 30)
    assert found is not None and found.chosen == (0, 0)


def test_no_layers() -> None:
    found = solve([], [], 5)
    assert found is not None and found.chosen == () and found.size == 0


def test_a_wider_choice_that_is_worse_is_never_taken() -> None:
    found = solve([[2.0, 1.0, 1.5]], [[2, 4, 8]], 100)
    assert found is not None and found.chosen == (1,)
