"""Loops that run a given number of times become Scans; others stay and are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import UnsupportedError
from kbitc.graph.evaluate import evaluate
from kbitc.graph.legality import refuse_unlowerable
from kbitc.passes.allocate.survey import survey
from kbitc.passes.canonicalize import canonicalize
from tests.support.lowered import run_of
from tests.support.onnx_text import assert_same, model, noise, operators

WEIGHTS = {
    "w": noise(4, 4) / 2, "five": np.array(5), "fives": np.array([5]), "yes": np.array(True), "none": np.array(0),
    "far": np.float32(1e9), "first": np.array([0]), "size": np.array([2, 4]), "fill": np.zeros((1, 4), np.float32),
}  # fmt: skip
STEP = "m = MatMul(h, w) \n t = Cast<to = 1>(i) \n s = Add(m, t) \n h2 = Tanh(s) \n r = Identity(h2)"


READS = STEP.replace("m = MatMul(h", "f = Cast<to = 1>(c) \n q = Mul(h, f) \n m = MatMul(q")


def loop(
    count: str = "five", begins: str = "yes", step: str = STEP, goes: str = "c2 = Identity(c)", **more: str
) -> str:
    """last f32 [2, 4] and all f32 [n, 2, 4] of a Loop over x."""
    return f"""
g (float[{more.get("rows", "2")}, 4] x) => (float[n, 4] last, float[k, n, 4] all) {{
  {more.get("before", "")}
  last, all = Loop({count}, {begins}, x) <
    body = turn (int64 i, bool c, float[n, 4] h) => (bool c2, float[m, 4] h2, float[m, 4] r) {{ {step} {goes} }}
  >
}}"""


@pytest.mark.parametrize(
    "text",
    [
        loop(),
        loop(begins=""),
        loop(count="fives"),
        loop(goes="c2 = Constant<value = bool {1}>()"),
        loop(step=READS),
        loop(count="long", before="d = Shape<start = 0, end = 1>(x) \n long = Squeeze(d)"),
    ],
    ids=[
        "counted",
        "without a condition",
        "count in an axis",
        "constant",
        "condition read",
        "as many as rows",
    ],
)
def test_a_counted_loop_is_a_scan(text: str) -> None:
    feeds = {"x": noise(2, 4)}
    expected = evaluate(model(text, WEIGHTS), feeds)
    subject = canonicalize(model(text, WEIGHTS))
    refuse_unlowerable(subject)
    assert "Loop" not in operators(subject)
    assert_same(expected, evaluate(subject, feeds))


def test_a_loop_without_states_is_a_scan() -> None:
    text = """g (float[2, 4] x) => (float[k, 2, 4] all) {
      all = Loop(five, yes) < body = turn (int64 i, bool c) => (bool c2, float[2, 4] r) {
        t = Cast<to = 1>(i)  r = Mul(x, t)  c2 = Identity(c) } > }"""
    subject = canonicalize(model(text, WEIGHTS))
    refuse_unlowerable(subject)
    feeds = {"x": noise(2, 4)}
    assert_same(evaluate(model(text, WEIGHTS), feeds), evaluate(subject, feeds))


def test_a_counted_loop_is_compiled_with_its_weight() -> None:
    text = loop(count="long", rows="N", before="d = Shape<start = 0, end = 1>(x) \n long = Squeeze(d)")
    subject = canonicalize(model(text, WEIGHTS))
    assert [(item.tensor, item.obstacle) for item in survey(subject)] == [("w", None)]
    run = run_of(subject)
    for rows in (3, 1):
        feeds = {"x": noise(rows, 4)}
        expected = evaluate(model(text, WEIGHTS), feeds)
        assert_same(expected, dict(zip(expected, run(feeds), strict=True)), terms=64)


@pytest.mark.parametrize(
    "text",
    [
        loop(goes="a = ReduceSum<keepdims = 0>(h2) \n c2 = Less(a, far)"),
        loop(count="", goes="c2 = Identity(c)"),
        loop(count="none"),
        loop(step="h2 = Concat<axis = 0>(h, fill) \n r = MatMul(fill, w)"),
    ],
    ids=["may stop", "without an end", "never", "grows"],
)
def test_other_loops_are_refused_by_name(text: str) -> None:
    subject = canonicalize(model(text, WEIGHTS))
    with pytest.raises(UnsupportedError, match="Loop"):
        refuse_unlowerable(subject)
