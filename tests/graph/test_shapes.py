"""Shapes with symbols: what ONNX's inference gives up, our rules finish."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.graph import dims as d
from kbitc.graph.evaluate import evaluate
from kbitc.graph.shape_values import ShapeValues
from kbitc.graph.shapes import infer_shapes
from tests.support.onnx_text import model, noise

INT = np.int64
WEIGHTS = {
    "w": noise(6, 4, 3, 3), "m": noise(8, 5), "axis0": np.array([0], INT), "axis1": np.array([1], INT),
    "first": INT(0), "nought": INT(0), "once": INT(1), "one": np.array([1], INT), "two": np.array([2], INT),
    "minus1": np.array([-1], INT), "zero": np.array([0], INT),
    "big": np.array([2**63 - 1], INT), "back": np.array([-2], INT), "pads": np.array([0, 1, 0, 2], INT),
    "scales": np.array([1, 1, 2, 2], np.float32), "step": np.array([-1], INT), "wt": noise(4, 2, 2, 2),
}  # fmt: skip


def output(graph: str) -> tuple[ir.Model, list[int | str]]:
    words = set(graph.replace("(", " ").replace(")", " ").replace(",", " ").split())
    subject = model(graph, {name: array for name, array in WEIGHTS.items() if name in words})
    shape = subject.graph.outputs[0].shape
    assert shape is not None
    return subject, [dim if isinstance(dim, int) else str(dim.value) for dim in shape.dims]


IMAGE = "g (float[N, 4, H, W] x) => (float[] y) { %s }"
MATRIX = "g (float[N, 8] x) => (float[] y) { %s }"
HALVED = "Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w)"
HALVES = ["N", 6, "floor(H/2 - 1/2) + 1", "floor(W/2 - 1/2) + 1"]
PARTS = "s = Shape(x) \n n = Slice(s, zero, one) \n c = Slice(s, one, two)"
CASTS = "s = Shape(x) \n i = Cast<to = 6>(s) \n n = Slice(i, zero, one) \n j = Cast<to = 7>(n)"
CASES = {
    "conv": (IMAGE % f"y = {HALVED}", HALVES),
    "same": (
        IMAGE % 'y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)',
        ["N", 6, "floor(H/2 + 1/2)", "floor(W/2 + 1/2)"],
    ),
    "conv transpose": (IMAGE % "y = ConvTranspose<strides = [2, 2], group = 2>(x, wt)", ["N", 4, "2*H", "2*W"]),
    "pool": (IMAGE % "y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", ["N", 4, "floor(H/2)", "floor(W/2)"]),
    "resize": (IMAGE % "y = Resize(x, , scales)", ["N", 4, "2*H", "2*W"]),
    "flatten": (IMAGE % "y = Flatten<axis = 2>(x)", ["4*N", "H*W"]),
    "two paths": (IMAGE % f"a = {HALVED} \n b = {HALVED} \n y = Add(a, b)", HALVES),
    "concat": (IMAGE % "y = Concat<axis = 3>(x, x)", ["N", 4, "H", "2*W"]),
    "pad": (MATRIX % "y = Pad(x, pads)", ["N", 11]),
    "slice all": (MATRIX % "y = Slice(x, zero, big, axis0)", ["N", 8]),
    "matmul": (MATRIX % "y = MatMul(x, m)", ["N", 5]),
    "reshape through shape": (
        IMAGE % f"{PARTS} \n t = Concat<axis = 0>(n, c, minus1) \n y = Reshape(x, t)",
        ["N", 4, "H*W"],
    ),
    "cast in the chain": (
        IMAGE % f"{CASTS} \n t = Concat<axis = 0>(j, minus1) \n y = Reshape(x, t)",
        ["N", "4*H*W"],
    ),
    "expand": ("g (float[N, 1] x, float[N, K] z) => (float[] y) { s = Shape(z) \n y = Expand(x, s) }", ["N", "K"]),
    "range": (
        MATRIX % "s = Shape(x) \n n = Gather(s, first) \n r = Range(nought, n, once) \n y = Cast<to = 1>(r)",
        ["N"],
    ),
    "half": (MATRIX % "s = Shape(x) \n h = Div(s, two) \n y = ConstantOfShape(h)", ["floor(N/2)", 4]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_output_dims(name: str) -> None:
    graph, wanted = CASES[name]
    subject, found = output(graph)
    assert found == wanted
    for batch, height, width in ((1, 7, 12), (4, 10, 9)):
        numbers = {"N": batch, "H": height, "W": width, "K": 5}
        feeds = {}
        for value in subject.graph.inputs:
            dims = d.of(value) or []
            feeds[value.name] = noise(*(dim if isinstance(dim, int) else numbers[str(dim.value)] for dim in dims))
        real = evaluate(subject, feeds)["y"].shape
        shape = subject.graph.outputs[0].shape
        assert shape is not None
        assert tuple(shape.evaluate(numbers).dims) == real


def test_unknown_dims_get_symbols_of_their_own() -> None:
    subject, found = output("g (float[N] x) => (float[] y) { n = NonZero(x) \n f = Cast<to = 1>(n) \n y = Relu(f) }")
    assert found[0] == 1 and isinstance(found[1], str) and found[1].startswith("dim_")
    assert all(dim is not None for node in subject.graph for value in node.outputs for dim in (d.of(value) or [None]))


def test_values_of_shape_tensors() -> None:
    graph = """g (float[N, 3, 4] x) => (float[] y, int64[] p) {
        s = Shape(x) \n a = Slice(s, one, big) \n p = ReduceProd(a) \n q = Mul(p, two)
        t = Concat<axis = 0>(q, minus1)
        y = Reshape(x, t)
    }"""
    subject, _ = output(graph)
    values = ShapeValues()
    named = {value.name: value for node in subject.graph for value in node.outputs}
    assert [str(item) for item in values.elements(named["s"]) or []] == ["N", "3", "4"]
    assert values.elements(named["p"]) == [12]
    assert values.elements(named["t"]) == [24, -1]
    assert values.elements(named["y"]) is None


def test_dim_arithmetic() -> None:
    n = ir.SymbolicDim("n")
    assert d.add(n, 0) == n and d.subtract(n, n) == 0
    assert d.multiply(None, 0) == 0 and d.add(None, 1) is None
    assert d.floor_divide(7, 2) == 3 and d.floor_divide(n, 0) is None
    assert d.exact_divide(12, 5) is None and str(d.exact_divide(d.multiply(n, 6), 3)) == "2*n"
    assert d.broadcast([[1, n], [5, 1]]) == [5, n]
    assert d.broadcast([[n], [ir.SymbolicDim("m")]]) == [None]
    assert d.broadcast([[n, 3], [3]]) == [n, 3]


def test_shapes_without_types_are_kept_and_not_complained_of(caplog: pytest.LogCaptureFixture) -> None:
    """An operator that ONNX does not know leaves its readers without a type until it is translated."""
    text = "g (float[b, 8] x, float[b, 8] c) => (float[] y) { k = com.microsoft.Gelu(x) s = Add(k, c) y = Relu(s) }"
    subject = model(text, domains=', "com.microsoft" : 1')
    value = next(node for node in subject.graph if node.op_type == "Add").outputs[0]
    infer_shapes(subject)
    value.type, value.shape = None, ir.Shape(["b", 8])
    infer_shapes(subject)
    assert value.shape is not None and len(value.shape) == 2
    assert not caplog.records
