"""Channels-last islands: fewer Transposes than operators, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.graph.evaluate import evaluate
from kbitc.graph.functions import DYNAMIC_QUANTIZE, add_functions
from kbitc.graph.shapes import infer_shapes
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.canonicalize import canonicalize
from kbitc.targets.lower.layout import first_from_last, last_axis, last_from_first, to_channels_last
from kbitc.targets.lower.layout_cleanup import reshape_idle_transposes
from kbitc.targets.lower.layout_reference import expand_core
from tests.support.onnx_text import assert_same, model, noise, operators

INT = np.int64
WEIGHTS = {
    "w": noise(6, 4, 3, 3), "w1": noise(6, 4, 1, 1, seed=1), "w6": noise(6, 6, 1, 1, seed=2),
    "b": noise(6), "half": np.float32(0.5), "column": noise(6, 1, 1), "full": noise(2, 6, 5, 5), "row": noise(5),
    "spatial": np.array([2, 3], INT), "channel": np.array([1], INT), "last2": np.array([-1, -2], INT),
    "axis2": np.array([2], INT), "axis3": np.array([3], INT), "s0": np.array([1], INT), "s1": np.array([3], INT),
    "flat": np.array([0, 6, -1], INT), "flat2": np.array([0, -1], INT), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2], INT),
    "scales": np.array([1, 1, 2, 3], np.float32), "sizes": np.array([2, 6, 7, 9], INT), "slope": noise(6, 1, 1, seed=5),
    "wt": noise(6, 3, 2, 2), "dw": noise(6, 1, 3, 3), "parts": np.array([2, 4], INT), "mat": noise(5, 7),
}  # fmt: skip


def build(nodes: str, data: str = "float[2, 4, 5, 5] x", outputs: str = "float[] y") -> ir.Model:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in WEIGHTS.items() if name in words}
    return model(f"g ({data}) => ({outputs}) {{ {nodes} }}", used)


def moved(subject: ir.Model) -> dict[str, int]:
    """Operator counts after the move, once it was shown that the numbers are exactly the same."""
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    signature = [(value.name, str(value.shape)) for value in (*subject.graph.inputs, *subject.graph.outputs)]
    to_channels_last(subject)
    assert [(value.name, str(value.shape)) for value in (*subject.graph.inputs, *subject.graph.outputs)] == signature
    counts = operators(subject)
    reference = expand_core(subject.clone())
    assert_same(before, evaluate(reference, feeds), terms=8)
    infer_shapes(reference, strict=True)
    return counts


# nodes -> Transposes that are left (one behind the input, one in front of the output where both keep channels first).
ISLANDS = {
    "conv": ("y = Conv(x, w, b)", 2),
    "depthwise": ("a = Conv(x, w1) \n y = Conv<group = 6>(a, dw)", 2),
    "conv transpose": ("a = Conv(x, w1) \n y = ConvTranspose<strides = [2, 2]>(a, wt)", 2),
    "pools": (
        "a = Conv(x, w1) \n m = MaxPool<kernel_shape = [2, 2]>(a) \n y = AveragePool<kernel_shape = [2, 2]>(m)", 2,
    ),
    "chain": ("a = Conv(x, w1) \n r = Relu(a) \n h = HardSwish(r) \n y = Conv(h, w6)", 2),
    "residual": ("a = Conv(x, w1) \n c = Conv(a, w6) \n s = Add(a, c) \n y = Relu(s)", 2),
    "squeeze and excite": (
        "a = Conv(x, w1) \n p = GlobalAveragePool(a) \n c = Conv(p, w6) \n h = HardSigmoid(c) \n y = Mul(a, h)", 2,
    ),
    "column constant": ("a = Conv(x, w1) \n m = Mul(a, column) \n y = Add(half, m)", 2),
    "row constant": ("a = Conv(x, w1) \n y = Mul(a, row)", 2),
    "full constant": ("a = Conv(x, w1) \n y = Sub(full, a)", 2),
    "prelu": ("a = Conv(x, w1) \n y = PRelu(a, slope)", 2),
    "clip": ("a = Conv(x, w1) \n y = Clip(a, half)", 2),
    "concat channels": ("a = Conv(x, w1) \n c = Conv(a, w6) \n y = Concat<axis = 1>(a, c)", 2),
    "concat width": ("a = Conv(x, w1) \n c = Conv(a, w6) \n y = Concat<axis = -1>(a, c)", 2),
    "softmax over channels": ("a = Conv(x, w1) \n y = Softmax<axis = 1>(a)", 2),
    "softmax over width": ("a = Conv(x, w1) \n y = Softmax(a)", 2),
    "split channels": ("a = Conv(x, w1) \n l, r = Split<axis = 1>(a, parts) \n y = Concat<axis = 1>(r, l)", 2),
    "mean over space": ("a = Conv(x, w1) \n y = ReduceMean<keepdims = 0>(a, spatial)", 1),
    "mean over space kept": ("a = Conv(x, w1) \n p = ReduceMean(a, last2) \n y = Mul(a, p)", 2),
    "max over channels": ("a = Conv(x, w1) \n y = ReduceMax<keepdims = 0>(a, channel)", 1),
    "pad": ("a = Conv(x, w1) \n y = Pad(a, pads, half)", 2),
    "slice": ("a = Conv(x, w1) \n y = Slice(a, s0, s1, axis3)", 2),
    "resize scales": ("a = Conv(x, w1) \n y = Resize<mode = \"nearest\">(a, , scales)", 2),
    "resize sizes": ("a = Conv(x, w1) \n y = Resize<mode = \"linear\">(a, , , sizes)", 2),
    "global pool and flatten": ("a = Conv(x, w1) \n p = GlobalMaxPool(a) \n y = Flatten(p)", 1),
    "global pool and reshape": ("a = Conv(x, w1) \n p = GlobalAveragePool(a) \n y = Reshape(p, flat2)", 1),
    "to a sequence": (
        "a = Conv(x, w1) \n f = Reshape(a, flat) \n t = Transpose<perm = [0, 2, 1]>(f) \n y = Relu(t)", 1,
    ),
    "from channels last": (
        "t = Transpose<perm = [0, 3, 1, 2]>(x) \n a = Conv(t, w) \n y = Transpose<perm = [0, 2, 3, 1]>(a)", 0,
    ),
    "cast": ("a = Conv(x, w1) \n c = Cast<to = 11>(a) \n y = Cast<to = 1>(c)", 2),
    "where": ("a = Conv(x, w1) \n g = Greater(a, half) \n y = Where(g, a, column)", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ISLANDS)
def test_islands(name: str) -> None:
    nodes, transposes = ISLANDS[name]
    data = "float[2, 5, 5, 4] x" if name == "from channels last" else "float[2, 4, 5, 5] x"
    counts = moved(build(nodes, data))
    assert counts.get("Transpose", 0) == transposes, counts
    assert not {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize"} & set(counts)


def test_one_dimensional_convolution() -> None:
    subject = model(
        "g (float[2, 4, 9] x) => (float[] y) { a = Conv(x, w) \n r = Relu(a) \n y = MaxPool<kernel_shape = [2]>(r) }",
        {"w": noise(6, 4, 3)},
    )
    assert moved(subject) == {
        "Relu": 1, "Transpose": 2, "kbitc.core::ConvNHWC": 1, "kbitc.core::MaxPoolNHWC": 1,
    }  # fmt: skip


def test_squeeze_to_a_sequence() -> None:
    """[N, C, 1, W] -> Squeeze -> Transpose -> MatMul, as text recognisers end: only the first Transpose stays."""
    nodes = "a = Conv(x, w1) \n s = Squeeze(a, axis2) \n t = Transpose<perm = [0, 2, 1]>(s) \n y = MatMul(t, w7)"
    weights = {"w1": WEIGHTS["w1"], "axis2": WEIGHTS["axis2"], "w7": noise(6, 7)}
    subject = model(f"g (float[2, 4, 1, 9] x) => (float[] y) {{ {nodes} }}", weights)
    assert moved(subject)["Squeeze"] == 1
    assert "Transpose" not in operators(subject) or operators(subject)["Transpose"] == 1


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Conv(x, w1) \n y = MatMul(a, mat)",  # the last axis is contracted
        "a = Conv(x, w1) \n y = Reshape(a, flat2)",  # flattens channels first
        "a = Conv(x, w1) \n y = ReduceMax<keepdims = 0>(a, axis2)",  # handled: still channels-last of rank 3
        "a = Conv(x, w1) \n y = Transpose<perm = [1, 0, 3, 2]>(a)",
        "a = Conv(x, w1) \n c = Conv(a, w6) \n y = Mul(a, c) \n z = MatMul(c, mat)",
    ],
)
def test_borders_inside_the_graph(nodes: str) -> None:
    outputs = "float[] y, float[] z" if " z =" in nodes else "float[] y"
    moved(build(nodes, outputs=outputs))


def test_graphs_without_convolutions_are_left_alone() -> None:
    subject = build("t = Transpose<perm = [0, 2, 3, 1]>(x) \n y = Relu(t)")
    assert moved(subject) == {"Relu": 1, "Transpose": 1}


def test_a_middle_that_is_an_output_keeps_its_layout() -> None:
    subject = build("a = Conv(x, w1) \n y = Relu(a)", outputs="float[] y, float[] a")
    assert moved(subject)["Transpose"] == 3


@pytest.mark.parametrize("block", [2, 4])
def test_dynamic_quantization_moves_its_axis(block: int) -> None:
    subject = build("y = Conv(x, w)")
    conv = next(iter(subject.graph))
    data = conv.inputs[0]
    node = ir.node(DYNAMIC_QUANTIZE, [data], {"axis": 1, "after": 2, "block": block}, domain="kbitc", name="dq")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "q", data.shape, data.type
    subject.graph.insert_before(conv, node)
    conv.replace_input_with(0, node.outputs[0])
    add_functions(subject, [DYNAMIC_QUANTIZE], 21)
    counts = moved(subject)
    assert counts == {"Transpose": 2, "kbitc.core::ConvNHWC": 1, "kbitc::DynamicQuantize": 1}
    quantize = next(node for node in subject.graph if node.op_type == DYNAMIC_QUANTIZE)
    assert (quantize.attributes.get_int("axis"), quantize.attributes.get_int("after")) == (3, 4)


def test_permutations() -> None:
    assert last_from_first(4) == [0, 2, 3, 1] and first_from_last(4) == [0, 3, 1, 2]
    assert last_from_first(3) == [0, 2, 1] == first_from_last(3)
    assert [last_axis(axis, 4) for axis in (0, 1, 2, 3, -1)] == [0, 3, 1, 2, 2]


def test_idle_transposes_become_reshapes() -> None:
    graph = """g (float[N, 1, 7] x, float[N, 2, 7] z) => (float[] y, float[] k) {
        y = Transpose<perm = [0, 2, 1]>(x) \n k = Transpose<perm = [0, 2, 1]>(z)
    }"""
    subject = model(graph)
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    assert reshape_idle_transposes(subject)
    assert operators(subject) == {"Reshape": 1, "Transpose": 1}
    assert_same(before, evaluate(subject, feeds))
    assert not reshape_idle_transposes(subject)


@pytest.mark.parametrize(("name", "transposes"), [("cls", 1), ("rec", 7), ("magika", 2)])
def test_real_models(name: str, transposes: int, real_models: dict[str, Path]) -> None:
    """cls keeps the Transpose of its input; rec that and three in each of its two attention blocks; magika two round
    its first LayerNormalization, which is over rows: its speed is the same as with reductions over rows."""
    shapes = {"cls": {"x": (1, 3, 48, 192)}, "rec": {"x": (1, 3, 48, 64)}, "magika": {}}[name]
    subject = canonicalize(load_model(real_models[name], shapes=shapes))
    assert moved(subject).get("Transpose", 0) == transposes
