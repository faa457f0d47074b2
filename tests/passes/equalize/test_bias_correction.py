"""After bias correction the mean of a layer's output is what it was, whatever stands behind the layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.graph import ops
from kbitc.graph.evaluate import evaluate
from kbitc.passes.calibrate.moments import moments, readers
from kbitc.passes.equalize.bias_correction import add_to_bias, shift
from kbitc.passes.solvers import rtn
from kbitc.quant.scheme import QuantScheme
from tests.support.onnx_text import model

PRODUCT, VECTOR = (8, 4), {"b": np.arange(1, 5, dtype=np.float32)}
CASES = {
    "product": ("(float[n, 8] x) => (float[n, 4] y) { y = MatMul(x, w) }", PRODUCT, {}),
    "product and bias": ("(float[n, 8] x) => (float[n, 4] y) { m = MatMul(x, w) y = Add(b, m) }", PRODUCT, VECTOR),
    "product read twice": ("(float[n, 8] x) => (float[n, 4] y) { m = MatMul(x, w) y = Add(m, m) }", PRODUCT, {}),
    "scalar added": (
        "(float[n, 8] x) => (float[n, 4] y) { m = MatMul(x, w) y = Add(m, b) }",
        PRODUCT,
        {"b": np.float32(1)},
    ),
    "convolution": (
        "(float[n, 8, 5, 5] x) => (float[n, 4, 5, 5] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
        (4, 8, 3, 3),
        {},
    ),
    "convolution and bias": ("(float[n, 8, 5] x) => (float[n, 4, 3] y) { y = Conv(x, w, b) }", (4, 8, 3), VECTOR),
    "convolution with computed bias": (
        "(float[n, 8, 5] x, float[4] b) => (float[n, 4, 3] y) { c = Neg(b) y = Conv(x, w, c) }",
        (4, 8, 3),
        {},
    ),
    "groups": ("(float[n, 8, 5] x) => (float[n, 4, 3] y) { y = Conv<group=2>(x, w) }", (4, 4, 3), {}),
}


def mean(y: np.ndarray) -> np.ndarray:
    """Mean of every output channel: axis 1, the last one of a product."""
    return y.astype(np.float64).mean(axis=tuple(axis for axis in range(y.ndim) if axis != 1))


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_the_output_comes_back(name: str) -> None:
    graph, shape, constants = CASES[name]
    rng = np.random.default_rng(3)
    weight = rng.normal(size=shape).astype(np.float32)
    made = model(f"g {graph}", {"w": weight, **constants})
    value = made.graph.initializers["w"]
    feed = {"x": rng.uniform(0.5, 1.5, (40, 8, *((5, 5)[: len(shape) - 2]))).astype(np.float32)}
    if "computed" in name:
        feed["b"] = rng.normal(size=4).astype(np.float32)
    node = next(iter(value.uses()))[0]
    inputs = moments(made, readers({"w": [node]}), [feed])["w"]
    before = evaluate(made, feed)["y"]

    kind = "conv" if node.op_type == "Conv" else "matmul"
    view = np.asarray(ops.to_view(weight, kind), np.float32)
    tensor = rtn.solve(view, QuantScheme.parse("int2:c"))
    value.const_value = ir.Tensor(np.ascontiguousarray(ops.from_view(tensor.dequantize(), kind, shape)), name="w")
    plain = evaluate(made, feed)["y"]
    add_to_bias(node, shift(view, tensor, inputs))
    after = evaluate(made, feed)["y"]

    assert made.graph.outputs[0].name == "y"
    lost = np.abs(mean(plain) - mean(before)).max()
    # float32 sums of 72 products of the size of the output
    assert np.abs(mean(after) - mean(before)).max() <= 72 * np.finfo(np.float32).eps * np.abs(before).max() * 2
    assert lost > 0.01


def test_an_added_constant_is_changed_in_place_and_not_for_its_other_readers() -> None:
    text = "g (float[n, 2] x) => (float[n, 2] y, float[2] z) { m = MatMul(x, w) y = Add(m, b) z = Neg(b) }"
    made = model(text, {"w": np.eye(2, dtype=np.float32), "b": np.array([1, 2], np.float32)})
    add_to_bias(made.graph[0], np.array([10, 20], np.float32))
    found = evaluate(made, {"x": np.zeros((1, 2), np.float32)})
    np.testing.assert_array_equal(found["y"], [[11, 22]])
    np.testing.assert_array_equal(found["z"], [-1, -2])
    assert [node.op_type for node in made.graph] == ["MatMul", "Add", "Neg"]
