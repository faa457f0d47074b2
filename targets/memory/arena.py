"""Lays values that live at different times over each other: in one stretch of memory, and in outputs not yet made.

Where values lie is found for numbers: from the largest to the smallest, each in the lowest gap between those that live
at the same time and have their place (Pisarchyk and Lee, arXiv 2001.03288, algorithm 3: greedy by size for offsets).
Of symbolic sizes, the numbers only settle which of two values lies below the other; the offset of a value is then the
largest end of the values below it, whatever the sizes are. So no two values that live at one time overlap for any.

Memory of an output lies idle until it is made. A value that is dead by then may lie in it, where it fits: of symbolic
sizes that shows when a run starts, so the first layout uses no output and is right for all; of the others, those that
fit compete with it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

ARENA = -1
MOST_LAYOUTS = 3
# A layout more must lower the mean excess over the largest live set by so much of it.
GAIN = 0.01
# Layouts that fill rooms less than full fit for more sizes: those of a network rise in steps of its strides.
SLACK = 7 / 8


@dataclass(frozen=True)
class Value:
    """What needs memory.

    Attributes:
        size: the place of its size.
        first, last: steps between which, both included, nothing else may lie there.
    """

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Room:
    """Memory of its own that a function gives back: idle before step `first`.

    Attributes:
        size: the place of its size.
    """

    size: int
    first: int


@dataclass(frozen=True)
class Layout:
    """Where values lie.

    Attributes:
        rooms: for each value the index of the room that it lies in, or ARENA.
        below: for each value the values that its offset is the largest end of; 0 without any.
        order: the values, each behind those below it.
    """

    rooms: tuple[int, ...]
    below: tuple[tuple[int, ...], ...]
    order: tuple[int, ...] = field(compare=False)

    def offsets(self, sizes: Sequence[int]) -> list[int]:
        """Bytes behind the start of its room or the arena, for each value.

        Args:
            sizes: bytes of each value.
        """
        found = [0] * len(self.below)
        for i in self.order:
            found[i] = max((found[j] + sizes[j] for j in self.below[i]), default=0)
        return found

    def tops(self, room: int) -> list[int]:
        """The values in a room, or in the arena, that may end last there."""
        covered = {j for below in self.below for j in below}
        return [i for i, where in enumerate(self.rooms) if where == room and i not in covered]

    def extent(self, sizes: Sequence[int], rooms: Sequence[int]) -> int | None:
        """Bytes of the arena; None where a room is too small.

        Args:
            sizes, rooms: bytes of each value and room.
        """
        offsets = self.offsets(sizes)
        ends = [0] * (len(rooms) + 1)
        for i, where in enumerate(self.rooms):
            ends[where] = max(ends[where], offsets[i] + sizes[i])
        return ends[ARENA] if all(end <= room for end, room in zip(ends, rooms, strict=False)) else None


def plan(values: Sequence[Value], rooms: Sequence[Room], points: Sequence[Sequence[int]]) -> tuple[Layout, ...]:
    """Layouts, of which the first is right for all sizes.

    Args:
        values: what is laid out.
        rooms: outputs.
        points: sizes by place, in bytes: layouts are found and compared for them.
    """
    neighbours = _neighbours(values)
    plain: dict[Layout, list[float]] = {}
    with_rooms: dict[Layout, list[float]] = {}
    tables = [([max(1, point[v.size]) for v in values], [point[room.size] for room in rooms]) for point in points]
    needs = [largest_live_set(values, rooms, point) for point in points]
    for sizes, spaces in tables:
        tried = [(plain, [0] * len(rooms)), (with_rooms, spaces), (with_rooms, [int(SLACK * n) for n in spaces])]
        for known, open_rooms in tried:
            layout = _found(values, rooms, neighbours, sizes, open_rooms)
            if layout not in known:
                known[layout] = [_excess(layout, *table, need) for table, need in zip(tables, needs, strict=True)]
    first = min(plain, key=lambda layout: (max(plain[layout]), sum(plain[layout])))
    chosen, costs = [first], plain[first]
    for _ in range(MOST_LAYOUTS - 1):
        others = {layout: list(map(min, costs, found)) for layout, found in (plain | with_rooms).items()}
        layout = min(others, key=lambda layout: sum(others[layout]))
        if sum(others[layout]) > sum(costs) - GAIN * len(points):
            break
        chosen.append(layout)
        costs = others[layout]
    return tuple(chosen)


def largest_live_set(values: Sequence[Value], rooms: Sequence[Room], point: Sequence[int]) -> int:
    """Bytes of the largest set of values and outputs that live at one time, at least 1; outputs live to the end."""
    events = [event for v in values for event in ((v.first, 0, point[v.size]), (v.last, 1, -point[v.size]))]
    now = most = 0
    for _, _, size in sorted([*events, *((room.first, 0, point[room.size]) for room in rooms)]):
        now += size
        most = max(most, now)
    return max(1, most)


def _excess(layout: Layout, sizes: Sequence[int], rooms: Sequence[int], need: int) -> float:
    extent = layout.extent(sizes, rooms)
    return float("inf") if extent is None else (extent + sum(rooms)) / need


def _neighbours(values: Sequence[Value]) -> list[list[int]]:
    """For each value those that live at the same time."""
    found: list[list[int]] = [[] for _ in values]
    alive: list[int] = []
    for i in sorted(range(len(values)), key=lambda i: values[i].first):
        alive = [j for j in alive if values[j].last >= values[i].first]
        for j in alive:
            found[i].append(j)
            found[j].append(i)
        alive.append(i)
    return found


def _found(
    values: Sequence[Value], rooms: Sequence[Room], neighbours: Sequence[Sequence[int]],
    sizes: Sequence[int], spaces: Sequence[int],
) -> Layout:  # fmt: skip
    """The layout for these sizes of values and rooms, from the largest value to the smallest."""
    offsets: list[int] = [-1] * len(sizes)
    places: list[int] = [ARENA] * len(sizes)
    by_space = sorted(range(len(rooms)), key=lambda room: (spaces[room], room))
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for room in (*by_space, ARENA):
            if room != ARENA and (spaces[room] < sizes[i] or rooms[room].first <= values[i].last):
                continue
            beside = [(offsets[j], sizes[j]) for j in neighbours[i] if offsets[j] >= 0 and places[j] == room]
            gap = _gap(sorted(beside), sizes[i])
            if room == ARENA or gap + sizes[i] <= spaces[room]:
                offsets[i], places[i] = gap, room
                break
    order = sorted(range(len(sizes)), key=lambda i: (offsets[i], i))
    below: list[tuple[int, ...]] = [()] * len(sizes)
    reached = [0] * len(sizes)  # as bits
    for i in order:
        lower = [j for j in neighbours[i] if places[j] == places[i] and offsets[j] < offsets[i]]
        far = functools.reduce(operator.or_, (reached[j] for j in lower), 0)
        # What is below another of them is below by that alone.
        below[i] = tuple(sorted(j for j in lower if not far >> j & 1))
        reached[i] = functools.reduce(operator.or_, (1 << j for j in lower), far)
    return Layout(tuple(places), tuple(below), tuple(order))


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest offset where `size` bytes fit between sorted (offset, size) pairs."""
    end = 0
    for start, length in taken:
        if start - end >= size:
            break
        end = max(end, start + length)
    return end
