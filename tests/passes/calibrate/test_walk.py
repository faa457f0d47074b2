"""Runs that take up where the one before them got to give what runs from the start give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc.graph.evaluate import evaluate
from kbitc.passes.calibrate import walk
from kbitc.passes.calibrate.walk import HELD_BYTES, Walk
from tests.support.onnx_text import model

Array = npt.NDArray[Any]
GRAPH = """agraph (float[N, 8] x) => (float[N, 8] y) {
    a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Add(c, a)  e = MatMul(d, w)  y = Add(e, b) }"""
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.normal(size=(8, 8)).astype(np.float32) for name in "uvw"}
FEEDS = [{"x": RNG.normal(size=(rows, 8)).astype(np.float32)} for rows in (3, 5)]


def subject(**changed: Array) -> ir.Model:
    made = model(GRAPH, {**WEIGHTS, **changed})
    for node in made.graph:
        node.name = f"make {node.outputs[0].name}"
    return made


def read(found: Walk, made: ir.Model, names: Sequence[str], first: str) -> None:
    """What the walk gives is what the whole model gives."""
    for feed, values in zip(FEEDS, found.run(made, names, first), strict=True):
        want = {**feed, **evaluate(made, feed, [name for name in names if name not in ("x", "y")])}
        assert list(values) == list(names)
        for name in names:
            np.testing.assert_array_equal(values[name], want[name])


@pytest.mark.parametrize("limit", [HELD_BYTES, 0])
def test_runs_see_the_weights_that_were_solved_in_between(limit: int) -> None:
    found, halves = Walk(FEEDS, limit), {name: array / 2 for name, array in WEIGHTS.items()}
    read(found, subject(), ["x"], "make a")
    read(found, subject(u=halves["u"]), ["b", "x"], "make c")
    read(found, subject(u=halves["u"], v=halves["v"]), ["d", "b"], "make e")
    read(found, subject(**halves), ["y"], "make y")


def test_what_lies_in_front_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str | None]] = []
    plain = walk.Session

    def watched(made: ir.Model) -> Any:
        ran.append([node.outputs[0].name for node in made.graph])
        return plain(made)

    monkeypatch.setattr(walk, "Session", watched)
    found = Walk(FEEDS)
    for names, first in ((["x"], "make a"), (["b"], "make c"), (["d"], "make e"), (["y"], "make y")):
        list(found.run(subject(), names, first))
    assert ran == [["a", "b"], ["c", "d"], ["e", "y"]]
