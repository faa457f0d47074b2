"""Lays values that live at different times over each other, in one stretch of memory.

Offsets are found for numbers: values from the largest to the smallest, each in the lowest gap between those that live
at the same time and have their place (Pisarchyk and Lee, arXiv 2001.03288, algorithm 3: greedy by size for offsets).
Of symbolic sizes, the numbers only settle which of two values lies below the other; the offset of a value is then the
largest end of the values below it, whatever the sizes are. So no two values that live at one time overlap for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbitc.targets.memory.bounds import Bound, largest

# Bytes; as TVM's own allocations.
ALIGNMENT = 64
# An offset is the maximum of at most so many sums.
MOST_SUMS = 6


@dataclass(frozen=True)
class Value:
    """What needs memory.

    Attributes:
        size: bytes.
        first, last: steps between which, both included, nothing else may lie there.
    """

    size: Bound
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """Where values lie.

    Attributes:
        offsets: bytes, one entry a value: the largest of these sums, rounded up to a multiple of ALIGNMENT.
        size: bytes of all of it, the largest of these sums.
    """

    offsets: tuple[tuple[Bound, ...], ...]
    size: tuple[Bound, ...]


def plan(values: Sequence[Value], points: Sequence[Sequence[int]]) -> Arena:
    """An offset for each value.

    Args:
        values: what is laid out.
        points: numbers for the symbolic quantities in the sizes: the plan of the point is taken that is best for all.
    """
    neighbours = _neighbours(values)
    padded = [_padded(value.size) for value in values]
    needs = [max(1, _live(values, [bound.at(point) for bound in padded])) for point in points]
    best, best_excess = None, 0.0
    for point in points:
        arena = _stacked(padded, neighbours, _offsets([bound.at(point) for bound in padded], neighbours))
        sizes = [max((bound.at(other) for bound in arena.size), default=0) for other in points]
        excess = max(size / need for size, need in zip(sizes, needs, strict=True))
        if best is None or excess < best_excess:
            best, best_excess = arena, excess
    assert best is not None
    return best


def _padded(size: Bound) -> Bound:
    """Room for a value: what lies on a symbolic one starts up to ALIGNMENT - 1 bytes behind its sum."""
    if size.is_constant:
        return Bound.constant(-(-size.at(()) // ALIGNMENT) * ALIGNMENT)
    return size + Bound.constant(ALIGNMENT)


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


def _live(values: Sequence[Value], sizes: Sequence[int]) -> int:
    """Bytes of the largest set of values that live at one time."""
    events = sorted(
        event for v, size in zip(values, sizes, strict=True) for event in ((v.first, 0, size), (v.last, 1, -size))
    )
    now = most = 0
    for _, _, size in events:
        now += size
        most = max(most, now)
    return most


def _offsets(sizes: Sequence[int], neighbours: Sequence[Sequence[int]]) -> list[int]:
    """The lowest gap that fits, from the largest value to the smallest."""
    offsets: list[int] = [-1] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        end = 0
        for start, size in sorted((offsets[j], sizes[j]) for j in neighbours[i] if offsets[j] >= 0):
            if start - end >= sizes[i]:
                break
            end = max(end, start + size)
        offsets[i] = end
    return offsets


def _stacked(padded: Sequence[Bound], neighbours: Sequence[Sequence[int]], numbers: Sequence[int]) -> Arena:
    """Offsets for all sizes, where each value lies above the neighbours whose number is lower."""
    offsets: list[tuple[Bound, ...]] = [()] * len(padded)
    ends: list[Bound] = []
    # Where a sum is no multiple of ALIGNMENT, what it is the offset of ends later.
    spare = Bound.constant(0 if all(bound.is_constant for bound in padded) else ALIGNMENT)
    for i in sorted(range(len(padded)), key=lambda i: (numbers[i], i)):
        below = [j for j in neighbours[i] if numbers[j] < numbers[i]]
        sums = [start + padded[j] for j in below for start in offsets[j]]
        offsets[i] = largest(sums or [Bound.constant(0)], MOST_SUMS)
        ends.extend(start + padded[i] + spare for start in offsets[i])
    return Arena(tuple(offsets), largest(dict.fromkeys(ends), MOST_SUMS))
