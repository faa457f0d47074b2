"""onnxruntime's quantized and fused operators, opened, give what its own kernels give, to one step of the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kbitc.graph.evaluate import evaluate
from kbitc.graph.legality import refuse_unlowerable
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.canonicalize import canonicalize
from tests.support.onnx_text import assert_same, noise, proto

HEADER = "g (%s) => (%s y) { %s }"
IMAGE, ROWS = "uint8[2, 4, 6, 5] x", "uint8[3, 8] x"


def codes(dtype: type[np.generic], *shape: int, seed: int = 0) -> Any:
    info = np.iinfo(dtype)  # type: ignore[arg-type]
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def number(value: float) -> Any:
    return np.array(value, np.float32)


SCALES = {
    "s": number(0.02), "z": np.array(120, np.uint8), "t": number(0.031), "v": np.array(90, np.uint8),
    "n": np.array(-3, np.int8), "r": number(0.05), "e": np.array(7, np.uint8),
}  # fmt: skip
WEIGHTS = SCALES | {
    "x2": codes(np.uint8, 4, 1, 5, seed=1), "w": codes(np.int8, 6, 2, 3, 3, seed=2),
    "wu": codes(np.uint8, 8, 5, seed=3), "m": codes(np.uint8, 4, 6, 5, seed=9) > 128,
    "ws": np.linspace(0.01, 0.03, 6, dtype=np.float32), "wz": np.zeros(6, np.int8),
    "b": np.random.default_rng(4).integers(-3000, 3000, 6).astype(np.int32),
    "cs": np.linspace(0.01, 0.03, 5, dtype=np.float32), "cz": codes(np.uint8, 5, seed=5),
    "c": np.random.default_rng(6).integers(-3000, 3000, 5).astype(np.int32),
    "g": codes(np.int8, 5, 8, seed=7), "k": codes(np.int8, 8, 5, seed=8),
    "gs": np.linspace(0.01, 0.02, 5, dtype=np.float32), "gz": np.zeros(5, np.int8), "h": noise(5),
}  # fmt: skip
TO_CODES = {
    "add": (IMAGE, "y = com.microsoft.QLinearAdd(x, s, z, x2, t, v, r, e)"),
    "mul": (IMAGE, "y = com.microsoft.QLinearMul(x, s, z, x2, t, v, r, e)"),
    "sigmoid": (IMAGE, "y = com.microsoft.QLinearSigmoid(x, s, z, r, e)"),
    "leaky": (IMAGE, "y = com.microsoft.QLinearLeakyRelu<alpha = 0.2>(x, s, z, r, e)"),
    "concat": (IMAGE, "y = com.microsoft.QLinearConcat<axis = 1>(r, e, x, s, z, x, t, v)"),
    "softmax": (ROWS, "y = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(x, s, z, r, e)"),
    "where": (IMAGE, "y = com.microsoft.QLinearWhere(m, x, s, z, x2, t, v, r, e)"),
    "global pool": (IMAGE, "y = com.microsoft.QLinearGlobalAveragePool(x, s, z, r, e)"),
    "pool": (
        IMAGE,
        "y = com.microsoft.QLinearAveragePool<kernel_shape = [2, 3], strides = [2, 1], pads = [0, 1, 0, 1]>"
        "(x, s, z, r, e)",
    ),
    "conv": (IMAGE, "y = QLinearConv<pads = [1, 1, 1, 1], group = 2>(x, s, z, w, ws, wz, r, e, b)"),
    "conv of one scale": (IMAGE, "y = QLinearConv<strides = [2, 2], group = 2>(x, s, z, w, t, n, r, e)"),
    "matmul": (ROWS, "y = QLinearMatMul(x, s, z, wu, t, v, r, e)"),
    "matmul of columns": (ROWS, "y = QLinearMatMul(x, s, z, wu, cs, cz, r, e)"),
    "gemm": (ROWS, "y = com.microsoft.QGemm<alpha = 0.5, transB = 1>(x, s, z, g, gs, gz, c, r, e)"),
}
FLOATS = "float[3, 8] x"
TO_FLOATS = {
    "gemm": (ROWS, "y = com.microsoft.QGemm(x, s, z, wu, t, v, c)"),
    "dynamic": (FLOATS, "y = com.microsoft.DynamicQuantizeMatMul(x, k, gs, gz, h)"),
    "dynamic without zero": (FLOATS, "y = com.microsoft.DynamicQuantizeMatMul(x, k, t)"),
    "to float": (ROWS, "y = com.microsoft.MatMulIntegerToFloat(x, k, s, gs, z, gz, h)"),
    "to float without zero": (ROWS, "y = com.microsoft.MatMulIntegerToFloat(x, wu, s, t, , v)"),
    "fused gemm": (
        FLOATS,
        'y = com.microsoft.FusedGemm<activation = "LeakyRelu", activation_alpha = 0.3, transB = 1>(x, gf, h)',
    ),
    "fused conv": (
        "float[2, 4, 6, 5] x",
        'y = com.microsoft.FusedConv<activation = "Clip", activation_params = [-0.5, 0.7], pads = [1, 1, 1, 1]>'
        "(x, wf, hf, sum)",
    ),
}
MORE = {"gf": noise(5, 8), "wf": noise(6, 4, 3, 3), "hf": noise(6), "sum": noise(2, 6, 6, 5)}


def outputs(inputs: str, nodes: str, kind: str) -> tuple[Any, Any]:
    """What onnxruntime gives for the model, and for its canonical form without operators of its own."""
    names = {word.strip(" ,()") for word in nodes.replace("(", " ( ").replace(",", " , ").split()}
    used = {key: array for key, array in (WEIGHTS | MORE).items() if key in names and key not in ("x", "y")}
    subject = load_model(proto(HEADER % (inputs, kind, nodes), used, opset=17, domains=', "com.microsoft" : 1'))
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    canonicalize(subject)
    refuse_unlowerable(subject)
    assert not any(node.domain for node in subject.graph)
    return before, evaluate(subject, feeds)


@pytest.mark.parametrize("name", TO_CODES)
def test_codes_are_the_same_to_one_step(name: str) -> None:
    before, after = outputs(*TO_CODES[name], "uint8[]")
    assert before["y"].dtype == after["y"].dtype == np.uint8
    assert len(np.unique(before["y"])) > 4
    assert int(np.abs(before["y"].astype(int) - after["y"].astype(int)).max()) <= 1


@pytest.mark.parametrize("name", TO_FLOATS)
def test_floats_are_the_same(name: str) -> None:
    assert_same(*outputs(*TO_FLOATS[name], "float[]"), 64)


def test_a_dynamic_lstm_is_the_lstm_of_the_weights_that_its_codes_stand_for() -> None:
    """What onnxruntime loses by rounding activations as well is not part of the meaning."""
    shape = {"w": (2, 6, 16), "r": (2, 4, 16)}
    held = {name: codes(np.int8, *dims, seed=3) for name, dims in shape.items()}
    scales = {f"{name}s": np.full((2, 16), 0.003, np.float32) * np.arange(1, 17, dtype=np.float32) for name in held}
    zeros = {f"{name}z": np.full((2, 16), 5, np.int8) for name in held}
    header = "g (float[3, 2, 6] x) => (float[3, 2, 2, 4] y) { %s }"
    attributes = 'direction = "bidirectional", hidden_size = 4'
    subject = load_model(
        proto(
            header % f"y = com.microsoft.DynamicQuantizeLSTM<{attributes}>(x, w, r, b,,,,, ws, wz, rs, rz)",
            held | scales | zeros | {"b": noise(2, 32)}, opset=17, domains=', "com.microsoft" : 1',
        )
    )  # fmt: skip
    canonicalize(subject)
    refuse_unlowerable(subject)
    floats = {
        name: np.swapaxes((held[name].astype(np.float32) - 5) * scales[f"{name}s"][:, None], 1, 2) for name in held
    }
    wanted = proto(header % f"y = LSTM<{attributes}>(x, w, r, b)", floats | {"b": noise(2, 32)}, opset=17)
    feeds = made_up_feeds(subject)
    assert_same(evaluate(load_model(wanted), feeds), evaluate(subject, feeds), 64)


@pytest.mark.parametrize("axes", [None, (2, 3)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_means_are_those_of_the_numbers(axes: tuple[int, ...] | None, keepdims: bool) -> None:
    """onnxruntime has no kernel to compare with; input and result have the same step here."""
    given = "" if axes is None else f"axes = {list(axes)}, "
    nodes = f"y = com.microsoft.QLinearReduceMean<{given}keepdims = {int(keepdims)}>(x, s, z, s, z)"
    subject = load_model(proto(HEADER % (IMAGE, "uint8[]", nodes), SCALES, opset=17, domains=', "com.microsoft" : 1'))
    canonicalize(subject)
    x = codes(np.uint8, 2, 4, 6, 5)
    found, wanted = evaluate(subject, {"x": x})["y"], x.mean(axis=axes, keepdims=keepdims)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 0.5 + 1e-3


def test_a_form_without_a_body_is_refused_by_name() -> None:
    from kbitc.errors import UnsupportedError

    nodes = "y = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2], channels_last = 1>(x, s, z, r, e)"
    subject = load_model(proto(HEADER % (IMAGE, "uint8[]", nodes), SCALES, opset=17, domains=', "com.microsoft" : 1'))
    canonicalize(subject)
    with pytest.raises(UnsupportedError, match="QLinearAveragePool"):
        refuse_unlowerable(subject)
