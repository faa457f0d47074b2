"""Splitting a product: the same numbers, a weight that is easier to quantize, and what must not be split."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc import options
from kbitc.errors import UsageError
from kbitc.graph.evaluate import evaluate
from kbitc.graph.text import model_text
from kbitc.passes.allocate.survey import survey
from kbitc.passes.split import COLUMNS, MEANS
from kbitc.passes.split.centre_weights import CentreWeights
from kbitc.passes.split.keep_columns import KeepColumns, largest_units

BODY = """g (float[a, b, 40] x) => (float[a, b, 24] y, float[a, b, 24] z) {
    h = MatMul(x, first)
    s = Add(h, bias)
    r = Relu(s)
    y = MatMul(r, second)
    z = MatMul(r, third)
}"""
SHAPES = {"first": (40, 33), "bias": (33,), "second": (33, 24), "third": (33, 24)}
# Float32 sums of 40 products in another order, relative to the sum of their magnitudes.
TOLERANCE = 40 * float(np.finfo(np.float32).eps)


def _model(body: str = BODY, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {body}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for index, node in enumerate(model.graph):
        node.name = f"node{index}"
    return model


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) + (name == "first") for name, shape in SHAPES.items()}


def _assert_same_numbers(one: ir.Model, other: ir.Model) -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 40)).astype(np.float32)
    expected, found = evaluate(one, {"x": x}), evaluate(other, {"x": x})
    onnx.checker.check_model(ir.to_proto(other), full_check=True)
    for name, array in expected.items():
        # 33 products of weights up to 4 with activations up to their largest.
        bound = TOLERANCE * 33 * 4 * float(np.abs(evaluate(one, {"x": x}, ["r"])["r"]).max())
        np.testing.assert_allclose(found[name], array, rtol=0, atol=bound)


@pytest.mark.parametrize("block", [0, 16, 32, 64])
def test_centring_changes_no_number_and_leaves_blocks_without_mean(block: int) -> None:
    model = _model(**_weights())
    assert CentreWeights(block)(model).modified
    _assert_same_numbers(_model(**_weights()), model)
    for name in ("first", "second", "third"):
        array = model.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        starts = np.arange(0, len(array), block or len(array))
        assert np.abs(np.add.reduceat(array, starts, axis=0)).max() < 1e-5 * len(array)
        assert f"{name}{MEANS}" in model.graph.initializers


def test_sums_of_an_activation_are_made_once() -> None:
    model = _model(**_weights())
    CentreWeights(16)(model)
    assert sum(node.op_type == "ReduceSum" for node in model.graph) == 2


def test_the_first_product_keeps_its_name() -> None:
    model = _model(**_weights())
    CentreWeights(16)(model)
    assert {item.tensor: item.nodes[0].name for item in survey(model) if not item.tensor.endswith(MEANS)} == {
        "first": "node0", "second": "node3", "third": "node4",
    }  # fmt: skip


def test_kept_columns_change_no_number() -> None:
    model = _model(**_weights())
    assert KeepColumns(0.1)(model).modified
    _assert_same_numbers(_model(**_weights()), model)
    kept = largest_units(_weights()["first"], 0.1)
    assert len(kept) == 4  # ceil(0.1 * 33)
    for name in ("second", "third"):
        values = model.graph.initializers
        assert not values[name].const_value.numpy()[kept].any()  # type: ignore[union-attr]
        np.testing.assert_array_equal(
            values[f"{name}{COLUMNS}"].const_value.numpy(),
            _weights()[name][kept].astype(np.float32),  # type: ignore[union-attr]
        )


def test_the_units_with_the_largest_deviation_are_kept() -> None:
    weight = np.random.default_rng(0).normal(size=(50, 20)) * np.where(np.isin(np.arange(20), (3, 17)), 5, 1)
    np.testing.assert_array_equal(largest_units(weight.astype(np.float32), 0.1), [3, 17])


@pytest.mark.parametrize(
    "body",
    [
        "g (float[2, 40] x) => (float[2, 33] y) { y = MatMul(x, w) }",  # no layer before
        "g (float[2, 33] x) => (float[2, 40] y) { h = MatMul(x, t) y = MatMul(h, w) z = Relu(w) }",  # another reader
        "g (float[2, 40] x) => (float[2, 33] y) { h = MatMul(x, q) s = Softmax(h) y = MatMul(s, w) }",  # units mixed
    ],
)
def test_columns_are_not_kept_where_their_units_are_not_known(body: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (40, 33), "t": (33, 40), "q": (40, 40)}
    model = _model(body, **{name: rng.normal(size=shape) for name, shape in shapes.items()})
    before = model_text(model)
    result = KeepColumns(0.1)(model)
    assert not result.modified and model_text(model) == before


def test_vectors_are_not_centred() -> None:
    model = _model("g (float[40] x) => (float[33] y) { y = MatMul(x, w) }", w=np.ones((40, 33)))
    assert not CentreWeights(16)(model).modified


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"proxy": 0.0}, "between 0 and 100"),
        ({"proxy": 100.0}, "between 0 and 100"),
        ({"proxy": 1.0, "scheme": "float32"}, "quantized weights"),
        ({"centre": True, "activations": "static", "bits": 8}, "use --activations dynamic or float"),
    ],
)
def test_splits_that_make_no_sense_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.from_arguments(**chosen)
