"""Integer-only graphs: no float operator is left, numbers stay near, and what cannot be had is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from kbitc import options
from kbitc.errors import UnsupportedError
from kbitc.graph import legality
from kbitc.graph.text import operator_counts
from tests.passes.rewrite.test_quantize_static import between, own_cache, quantized
from tests.support.onnx_text import noise
from tests.support.steps import check_steps

__all__ = ["own_cache"]
WEIGHTS = {name: noise(16, 16, seed=index) / 4 for index, name in enumerate("abcdef")}
NORMS = {"g": 1 + noise(16) / 4, "h": noise(16, seed=9) / 4}

# With mean pooling over the places that the mask leaves, and vectors of length one, as sentence encoders end.
ENCODER = """g (int64[N, 6] ids, int64[N, 6] mask) => (float[] y, float[] vector) {
    e = Gather(table, ids)  p = Add(e, where)  x = LayerNormalization(p, g, h)
    q0 = MatMul(x, a)  q = Add(q0, g)  k = MatMul(x, b)  v = MatMul(x, c)  t = Transpose<perm = [0, 2, 1]>(k)
    s = MatMul(q, t)  two = Constant<value_float = 2.0>()  s2 = Div(s, two)
    m = Cast<to = 1>(mask)  one = Constant<value_float = 1.0>()  o = Sub(one, m)
    far = Constant<value_float = -10000.0>()  f = Mul(o, far)  axis = Constant<value_ints = [1]>()
    u = Unsqueeze(f, axis)  z = Add(s2, u)  w = Softmax(z)
    n = MatMul(w, v)  d = MatMul(n, d0)  r = Add(d, x)  l = LayerNormalization(r, g, h)
    i = MatMul(l, e0)  j = Gelu(i)  i2 = MatMul(j, f0)  r2 = Add(i2, l)  l2 = LayerNormalization(r2, h, g)
    y = MatMul(l2, a)
    places = Constant<value_ints = [2]>()  u2 = Unsqueeze(m, places)  shown = Mul(l2, u2)
    total = ReduceSum<keepdims = 0>(shown, axis)  count = ReduceSum<keepdims = 1>(m, axis)
    tiny = Constant<value_float = 1e-9>()  some = Clip(count, tiny)  mean = Div(total, some)
    length = ReduceL2<keepdims = 1>(mean, axis)  long = Clip(length, tiny)  vector = Div(mean, long) }"""


def encoder_feeds() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    for length in (6, 4, 2, 5):
        mask = (np.arange(6) < length).astype(np.int64)
        made.append({"ids": rng.integers(0, 20, (8, 6)), "mask": np.repeat(mask[None], 8, 0)})
    return made


def encoder() -> tuple[ir.Model, ir.Model, Any, list[dict[str, Any]]]:
    weights = {"table": noise(20, 16), "where": noise(1, 6, 16) / 4, **NORMS}
    weights |= {name if name in "abc" else f"{name}0": array for name, array in WEIGHTS.items()}
    return quantized(ENCODER, weights, encoder_feeds(), integer_only=True, observer="minmax")


def test_an_encoder_has_no_float_operator() -> None:
    original, made, plan, feeds = encoder()
    assert legality.float_operators(made) == []
    counts = operator_counts(made)
    assert counts["kbitc::IntegerSoftmax"] == 1 and counts["kbitc::IntegerLayerNorm"] == 3
    assert counts["MatMulInteger"] == 9 and counts["QuantizeLinear"] == 1 and counts["DequantizeLinear"] == 2
    assert (
        counts["kbitc::IntegerSum"] == counts["kbitc::IntegerQuotient"] == 2 and counts["kbitc::IntegerReduceL2"] == 1
    )
    assert "MatMul" not in counts and plan.static.integer_only
    assert check_steps(original, made, plan, feeds[0])


def test_masked_places_have_no_weight() -> None:
    from kbitc.graph.evaluate import evaluate

    _, made, _, feeds = encoder()
    found = evaluate(made, feeds[2], ["w.q"])["w.q"]
    assert (found[..., 2:] == 0).all() and (found.sum(-1) >= 254).all()


def test_a_convolution_with_softmax_at_the_end() -> None:
    graph, weights = between("r = Relu(c)")
    graph = graph.replace("y = Conv(r, v) }", "s = Conv(r, v) p = GlobalAveragePool(s) f = Flatten(p) y = Softmax(f) }")
    original, made, plan, feeds = quantized(graph, weights, integer_only=True)
    assert legality.float_operators(made) == []
    assert check_steps(original, made, plan, feeds[0])


def test_float_inputs_enter_by_quantization_alone() -> None:
    graph = "g (float[N, 8] x, float[N, 8] z) => (float[] y) { s = Add(x, z) r = Relu(s) y = MatMul(r, w) }"
    original, made, plan, feeds = quantized(graph, {"w": noise(8, 4)}, integer_only=True)
    assert legality.float_operators(made) == []
    assert operator_counts(made)["kbitc::IntegerAdd"] == 1
    assert check_steps(original, made, plan, feeds[0])


def test_a_factor_for_each_channel_is_part_of_the_multipliers() -> None:
    """What the equalizer norm_outliers puts between a norm and a product."""
    graph = """g (float[N, 16] x) => (float[] y) { m = MatMul(x, a) s = Add(m, x) n = LayerNormalization(s, g, h)
        p = Mul(n, f) o = MatMul(p, b) r = Add(o, n) y = LayerNormalization(r, g, h) }"""
    weights = {"a": noise(16, 16), "b": noise(16, 16, seed=1), "f": np.abs(noise(16)) + 0.1, **NORMS}
    original, made, plan, feeds = quantized(graph, weights, integer_only=True)
    assert legality.float_operators(made) == []
    (node,) = (node for node in made.graph if node.outputs[0].name == "p.q")
    assert node.op_type == "Requantize" and node.inputs[1].shape == (16,)
    assert "kbitc::IntegerMul" not in operator_counts(made)
    assert check_steps(original, made, plan, feeds[0])


def test_what_has_no_integer_form_is_named() -> None:
    graph = "g (float[N, 8] x) => (float[] y) { m = MatMul(x, w) s = Sin(m) y = MatMul(s, w) }"
    with pytest.raises(UnsupportedError, match=r"leaves 2 float operators.*Sin has no integer form"):
        quantized(graph, {"w": noise(8, 8)}, integer_only=True)


def test_a_sum_in_front_of_what_has_no_form_is_named() -> None:
    graph = "g (float[N, 8] x) => (float[] y) { m = MatMul(x, w) n = MatMul(x, v) a = Sub(m, n) s = Sin(a) y = Abs(s) }"
    with pytest.raises(UnsupportedError, match=r"Sin has no integer form"):
        quantized(graph, {"w": noise(8, 8), "v": noise(8, 8, seed=1)}, integer_only=True)


def test_integer_only_is_static() -> None:
    assert options.from_arguments(bits=8, integer_only=True).activation == "uint8"


@pytest.mark.parametrize(
    "end", ["y = Sigmoid(c)", "y = MaxPool<kernel_shape = [2, 2]>(c)", "y = Relu(c)", "y = Add(c, c)"]
)
def test_any_operator_may_be_the_last(end: str) -> None:
    graph = f"g (float[N, 3, 12, 10] x) => (float[] y) {{ c = Conv<pads = [1, 1, 1, 1]>(x, w) {end} }}"
    original, made, plan, feeds = quantized(graph, {"w": noise(6, 3, 3, 3)}, integer_only=True)
    assert legality.float_operators(made) == []
    assert check_steps(original, made, plan, feeds[0])
