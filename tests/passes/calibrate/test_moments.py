"""Moments are what numpy says, whatever the order of the batches, and groups of layers respect the budget."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.passes.calibrate.moments import LIMIT, Reader, in_groups, moments, readers, weights
from kbitc.passes.calibrate.stream import stream
from tests.support.onnx_text import model, noise

GRAPH = """g (float[n, 4] x) => (float[n, 3] y, float[n, 2] z)
{ h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b)  z = MatMul(r, c) }"""


def small() -> ir.Model:
    return model(GRAPH, {"a": noise(4, 5), "b": noise(5, 3), "c": noise(5, 2)})


def feeds(count: int = 4, rows: int = 7) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(size=(rows, 4)).astype(np.float32)} for _ in range(count)]


def users(made: ir.Model) -> dict[str, list[ir.Node]]:
    return {name: [node for node, _ in made.graph.initializers[name].uses()] for name in "abc"}


def test_moments_are_those_of_the_unfolded_inputs() -> None:
    made, data = small(), feeds()
    found = moments(made, readers(users(made)), data)
    x = np.concatenate([feed["x"] for feed in data]).astype(np.float64)
    r = np.maximum(x.astype(np.float32) @ noise(4, 5), 0).astype(np.float64)
    # Sums of 28 products in float32: each is off by at most 28 roundings of the sum of magnitudes.
    for name, rows in (("a", x), ("b", r), ("c", r)):
        bound = 30 * np.finfo(np.float32).eps
        magnitude = np.abs(rows).T @ np.abs(rows) / len(rows)
        assert found[name].count == len(rows)
        assert (np.abs(found[name].second[0] - rows.T @ rows / len(rows)) <= bound * magnitude).all()
        assert (np.abs(found[name].mean[0] - rows.mean(0)) <= bound * np.abs(rows).mean(0)).all()
        assert (np.abs(found[name].mean_abs[0] - np.abs(rows).mean(0)) <= bound * np.abs(rows).mean(0)).all()


def test_the_order_of_the_batches_changes_no_bit() -> None:
    made, data = small(), feeds(5, 300)
    one, other = (moments(made, readers(users(made)), list(order)) for order in (data, data[::-1]))
    for name in one:
        np.testing.assert_array_equal(one[name].second, other[name].second)
        np.testing.assert_array_equal(one[name].mean, other[name].mean)


def test_layers_that_read_the_same_rows_share_them() -> None:
    made = small()
    found = moments(made, readers(users(made)), feeds())
    assert found["b"] is found["c"] and found["a"] is not found["b"]


def test_rows_that_are_not_finite_are_left_out() -> None:
    made, data = small(), feeds(1)
    data[0]["x"][3] = np.inf
    found = moments(made, readers(users(made))[:1], data)
    assert found["a"].count == 6 and np.isfinite(found["a"].second).all()


def test_a_row_counts_for_no_more_than_limit_mean_rows() -> None:
    rows = feeds(1, 256)[0]["x"][None]
    rows[0, 7] *= 1000
    share = weights(rows)
    counted = share * np.square(rows.astype(np.float64)).sum(axis=(0, 2))
    # The sum of 4 squares in float64, the share rounded to float32.
    np.testing.assert_allclose(counted[7], LIMIT * counted.mean(), rtol=2 * np.finfo(np.float32).eps)
    assert (np.delete(share, 7) == 1).all()


def test_rows_of_zeros_and_few_rows_count_in_full() -> None:
    assert (weights(np.zeros((1, 5, 4), np.float32)) == 1).all()
    rows = np.ones((1, LIMIT, 4), np.float32)
    rows[0, 0] = 1e6
    assert (weights(rows) == 1).all()


def test_how_huge_a_row_is_does_not_change_the_moments() -> None:
    made, found = small(), []
    for size in (1e6, 1e8):
        data = feeds(1, 256)
        data[0]["x"][7] *= np.float32(size)
        found.append(moments(made, readers(users(made))[:1], data)["a"])
    # Sums of 256 products in float32 and the share rounded to float32, in each of the two.
    # In the mean the row counts as 1 / size, below that.
    for name in ("second", "mean", "mean_abs"):
        one, other = (getattr(each, name) for each in found)
        np.testing.assert_allclose(one, other, rtol=0, atol=600 * np.finfo(np.float32).eps * np.abs(one).max())


def test_groups_respect_the_budget_and_count_equal_inputs_once() -> None:
    made = small()
    wanted = readers(users(made))
    assert [[reader.tensor for reader in group] for group in in_groups(wanted, 8 * 25 + 8 * 16)] == [["a", "b", "c"]]
    assert [[reader.tensor for reader in group] for group in in_groups(wanted, 8 * 25)] == [["a"], ["b", "c"]]
    assert [[reader.tensor for reader in group] for group in in_groups(wanted, parts=2)] == [["a"], ["b", "c"]]
    assert in_groups([]) == []


def test_a_sum_of_too_many_products_is_not_watched() -> None:
    """At 140,000 the moments would take 157 GB."""
    few, many = 1 << 14, (1 << 14) + 1
    made = model(
        f"""g (float[n, {few}] x, float[n, {many}] v) => (float[n, 1] y, float[n, 1] z)
        {{ y = MatMul(x, a) z = MatMul(v, b) }}""",
        {"a": np.zeros((few, 1), np.float32), "b": np.zeros((many, 1), np.float32)},
    )
    nodes = {name: [node for node, _ in made.graph.initializers[name].uses()] for name in "ab"}
    assert [reader.tensor for reader in readers(nodes)] == ["a"]


def test_a_look_up_is_not_watched() -> None:
    value = ir.Value(name="w")
    assert readers({"w": [ir.node("Gather", [value, value])]}) == []


def test_streaming_gives_inputs_and_values_and_runs_only_what_they_need() -> None:
    made = small()
    batches = list(stream(made, ["x", "r"], feeds()))
    assert [set(batch) for batch in batches] == [{"x", "r"}] * 4
    assert made.graph.outputs[0].name == "y" and "c" in made.graph.initializers


def test_a_reader_of_a_group_convolution_has_its_groups() -> None:
    weight = ir.Value(name="w", const_value=ir.Tensor(np.zeros((6, 1, 3, 3), np.float32)))
    found = readers({"w": [ir.node("Conv", [ir.Value(name="x"), weight], attributes={"group": 6})]})
    assert [(reader.groups, reader.size) for reader in found] == [(6, 9)]
    assert isinstance(found[0], Reader) and found[0].nbytes == 8 * 6 * 81
