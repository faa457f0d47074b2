"""Arithmetic on sizes: what is proved to be equal is equal for every size, and nothing else is."""

from __future__ import annotations

import pytest

from kbitc.targets.lower import dims


@pytest.mark.parametrize("start", [1, 4])
def test_the_two_parts_of_an_axis_are_together_the_whole(start: int) -> None:
    whole = dims.symbol("n")
    first = dims.minimum(start, whole)
    rest = dims.maximum(dims.simplify(whole - start), 0)
    assert dims.equal(dims.simplify(first + rest), whole)


def test_parts_of_different_axes_or_at_different_places_are_not() -> None:
    whole, other = dims.symbol("n"), dims.symbol("m")
    first = dims.minimum(4, whole)
    assert not dims.equal(first + dims.maximum(dims.simplify(other - 4), 0), whole)
    assert not dims.equal(first + dims.maximum(dims.simplify(whole - 3), 0), whole)
    assert not dims.equal(first, whole)
