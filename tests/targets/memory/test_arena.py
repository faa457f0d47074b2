"""Where values lie: what lives at one time never overlaps, rooms are left in time, and little is left over."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from kbitc.targets.memory.arena import ARENA, Layout, Room, Value, largest_live_set, plan


def check(values: list[Value], rooms: list[Room], layout: Layout, point: list[int]) -> None:
    """No two values that live at one time overlap, all end inside, and rooms are empty when they are used."""
    sizes, spaces = [point[value.size] for value in values], [point[room.size] for room in rooms]
    extent = layout.extent(sizes, spaces)
    if extent is None:
        return
    offsets = layout.offsets(sizes)
    for i, room in enumerate(layout.rooms):
        assert offsets[i] + sizes[i] <= (extent if room == ARENA else spaces[room])
        assert room == ARENA or values[i].last < rooms[room].first
    for room in {ARENA, *layout.rooms}:
        inside = [i for i, where in enumerate(layout.rooms) if where == room]
        tops = max((offsets[i] + sizes[i] for i in layout.tops(room)), default=0)
        assert tops == max((offsets[i] + sizes[i] for i in inside), default=0)
    for i, j in combinations(range(len(values)), 2):
        together = values[i].first <= values[j].last and values[j].first <= values[i].last
        if together and layout.rooms[i] == layout.rooms[j]:
            assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]


def lives(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return [(i, i + int(random.integers(0, 6))) for i in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_layouts_are_right_whatever_the_sizes_are(seed: int) -> None:
    """Sizes of other points than those that the layouts were found for, zeros too."""
    random = np.random.default_rng(seed)

    def point(n: int, m: int) -> list[int]:
        return [64 * size for size in (3 * n, n * m, n * n, n + 5, m * m * m, 12)]

    values = [Value(int(random.integers(0, 6)), *life) for life in lives(random, 40)]
    rooms = [Room(int(random.integers(0, 6)), step) for step in (15, 39)]
    layouts = plan(values, rooms, [point(4, 4), point(64, 64), point(1, 64)])
    assert set(layouts[0].rooms) == {ARENA}
    for n, m in product((0, 1, 3, 50, 1000), repeat=2):
        for layout in layouts:
            check(values, rooms, layout, point(n, m))


def test_a_chain_takes_its_two_largest_neighbours() -> None:
    """640 and 1280 bytes live together; the offsets leave nothing over."""
    sizes = [64, 640, 1280, 64, 640]
    values = [Value(place, place, place + 1) for place in range(5)]
    assert plan(values, [], [sizes])[0].extent(sizes, []) == 1920


def test_what_is_dead_before_an_output_lies_in_its_memory() -> None:
    """1280 + 640, then 640 + an output of 1920: apart 3840, of which 2560 live at one time."""
    sizes = [1280, 640, 1920]
    values, rooms = [Value(0, 0, 1), Value(1, 1, 2)], [Room(2, 2)]
    layout = plan(values, rooms, [sizes])[-1]
    assert layout.rooms == (0, ARENA) and layout.extent(sizes[:2], sizes[2:]) == 640
    assert largest_live_set(values, rooms, sizes) == 640 + 1920
    check(values, rooms, layout, sizes)


def test_a_layout_does_not_count_where_an_output_is_too_small() -> None:
    layout = Layout((0,), ((),), (0,))
    assert layout.extent([128], [64]) is None
    assert layout.extent([128], [128]) == 0
