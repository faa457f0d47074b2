"""If on a condition that is known, and on one that is only known when the model runs."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.graph.evaluate import evaluate
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.canonicalize.if_to_where import IfToWhere
from kbitc.passes.canonicalize.inline_constant_if import InlineConstantIf
from tests.support.onnx_text import apply, assert_same, model, noise, operators

NUMBERS = {"zero": np.float32(0), "index": np.array([5], np.int64), "axis": np.array([1])}


def branches(then: str, other: str, condition: str = "flag = Greater(s, zero)") -> str:
    """y f32 [2, 4] from one of two graphs, chosen by the sum of x [2, 4]."""
    return f"""
g (float[2, 4] x, int64[2] place) => (float[2, 4] y) {{
  s = ReduceSum<keepdims = 0>(x)
  {condition}
  y = If(flag) <
    then_branch = then () => (float[2, 4] t) {{ {then} }},
    else_branch = other () => (float[2, 4] e) {{ {other} }}
  >
}}"""


PRODUCTS = branches("t = MatMul(x, v)", "a = MatMul(x, w) \n e = Relu(a)")
WEIGHTS = NUMBERS | {"v": noise(4, 4), "w": noise(4, 4, seed=1)}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("condition", ["flag = Greater(s, zero)", "f = Greater(s, zero) \n flag = Unsqueeze(f, axis)"])
def test_a_run_time_condition_chooses_between_both_results(sign: int, condition: str) -> None:
    weights = WEIGHTS | {"axis": np.array([0])}
    text = branches("t = MatMul(x, v)", "a = MatMul(x, w) \n e = Relu(a)", condition)
    feeds = {"x": sign * np.abs(noise(2, 4)), "place": np.array([0, 1])}
    expected = evaluate(model(text, weights), feeds)
    subject = model(text, weights)
    assert apply(IfToWhere(), subject, terms=4)
    assert_same(expected, evaluate(subject, feeds), terms=4)
    assert operators(subject)["MatMul"] == 2 and "If" not in operators(subject)


@pytest.mark.parametrize(
    ("then", "other"),
    [
        ("t = Gather<axis = 0>(x, place)", "e = Relu(x)"),
        ("i = Div(index, place) \n f = Cast<to = 1>(i) \n g = Unsqueeze(f, axis) \n t = Add(x, g)", "e = Relu(x)"),
        ("t = RandomNormalLike(x)", "e = Relu(x)"),
    ],
)
def test_a_branch_that_may_fail_or_draws_random_numbers_is_kept(then: str, other: str) -> None:
    subject = model(branches(then, other), NUMBERS)
    assert not IfToWhere()(subject).modified


def test_results_of_other_shapes_are_kept() -> None:
    text = branches("t = Relu(x)", "e = Relu(x)").replace("float[2, 4] e", "float[1, 4] e")
    subject = model(
        text.replace("e = Relu(x)", "e = ReduceSum<keepdims = 1>(x, first)"), NUMBERS | {"first": np.array([0])}
    )
    assert not IfToWhere()(subject).modified


def test_a_known_condition_is_not_left_to_run_time() -> None:
    """Canonicalisation folds first, and only then computes both branches."""
    text = branches("t = MatMul(x, v)", "e = MatMul(x, w)", "n = Size(x) \n flag = Equal(n, eight)")
    subject = canonicalize(model(text, WEIGHTS | {"eight": np.int64(8)}))
    assert operators(subject) == {"MatMul": 1}


def test_weights_of_the_other_branch_go() -> None:
    subject = model(PRODUCTS.replace("Greater(s, zero)", "Identity(known)"), WEIGHTS | {"known": np.array(True)})
    subject = canonicalize(subject)
    assert len(subject.graph.initializers) == 1


def test_nested_branches_are_chosen_from_the_inside() -> None:
    inner = (
        "t = If(flag) <then_branch = a () => (float[2, 4] p) { p = Relu(x) }, "
        "else_branch = b () => (float[2, 4] q) { q = Neg(x) }>"
    )
    text = branches(inner, "e = Abs(x)")
    expected = evaluate(model(text, NUMBERS), {"x": noise(2, 4), "place": np.array([0, 1])})
    subject = canonicalize(model(text, NUMBERS))
    assert operators(subject)["Where"] == 2
    assert_same(expected, evaluate(subject, {"x": noise(2, 4), "place": np.array([0, 1])}))


def test_a_known_condition_is_inlined() -> None:
    subject = model(PRODUCTS.replace("Greater(s, zero)", "Not(known)"), WEIGHTS | {"known": np.array(True)})
    assert not apply(InlineConstantIf(), subject), "a computed condition is no constant yet"


def test_an_if_in_the_dropped_branch_goes_with_it() -> None:
    inner = (
        "t = If(known) <then_branch = a () => (float[2, 4] p) { p = Relu(x) }, "
        "else_branch = b () => (float[2, 4] q) { q = Neg(x) }>"
    )
    text = branches(inner, "e = Abs(x)", "flag = Not(known)")
    assert operators(canonicalize(model(text, NUMBERS | {"known": np.array(True)}))) == {"Abs": 1}
