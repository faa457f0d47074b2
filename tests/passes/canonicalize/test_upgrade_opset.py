"""Adapters: each old form computes in opset 21 what it computed in its own opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kbitc.errors import UnsupportedError
from kbitc.graph.evaluate import evaluate, session_options
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.canonicalize.upgrade_opset import UpgradeOpset
from tests.support.onnx_text import assert_same, noise, operators, proto

# (opset, node lines, extra weights) on x: float[2,3,4,5] -> y.
OLD_FORMS = {
    "slice": (9, "y = Slice<starts = [1, 0], ends = [2, 1000], axes = [1, 3]>(x)", {}),
    "slice without axes": (9, "y = Slice<starts = [0, 1], ends = [2, -1]>(x)", {}),
    "clip": (9, "y = Clip<min = -0.5, max = 0.25>(x)", {}),
    "clip one side": (9, "y = Clip<max = 0.25>(x)", {}),
    "pad": (9, "y = Pad<pads = [0, 0, 1, 2, 0, 0, 0, 1], value = 2.5>(x)", {}),
    "pad reflect": (9, 'y = Pad<mode = "reflect", pads = [0, 0, 1, 2, 0, 0, 0, 1]>(x)', {}),
    "squeeze": (9, "a = Slice<starts = [0], ends = [1], axes = [1]>(x) \n y = Squeeze<axes = [1]>(a)", {}),
    "unsqueeze": (11, "y = Unsqueeze<axes = [0, 3]>(x)", {}),
    "reduce sum": (12, "y = ReduceSum<axes = [1, -1], keepdims = 0>(x)", {}),
    "reduce mean": (17, "y = ReduceMean<axes = [2]>(x)", {}),
    "reduce all": (17, "y = ReduceMax<keepdims = 0>(x)", {}),
    "softmax flattens": (12, "y = Softmax(x)", {}),
    "softmax last": (12, "y = Softmax<axis = 3>(x)", {}),
    "softmax negative": (11, "y = Softmax<axis = -2>(x)", {}),
    "log softmax flattens": (9, "y = LogSoftmax<axis = 2>(x)", {}),
    "hardmax flattens": (9, "y = Hardmax<axis = 1>(x)", {}),
    "split attribute": (12, "y, rest = Split<axis = 2, split = [1, 3]>(x)", {}),
    "split even": (13, "y, rest = Split<axis = 2>(x)", {}),
    "dropout": (10, "y = Dropout<ratio = 0.9>(x)", {}),
    "upsample": (9, "y = Upsample(x, s)", {"s": np.array([1, 1, 2, 3], np.float32)}),
    "resize 10": (10, "y = Resize(x, s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
    "resize 10 linear": (10, 'y = Resize<mode = "linear">(x, s)', {"s": np.array([1, 1, 2, 2], np.float32)}),
    "top k": (9, "y, i = TopK<k = 2>(x)", {}),
    "batch norm": (9, "y = BatchNormalization(x, c, c, c, v)", {"c": noise(3), "v": np.ones(3, np.float32)}),
    "dft": (19, "w = Unsqueeze(x, a) \n y = DFT<axis = 2>(w)", {"a": np.array([4], np.int64)}),
}


def old_run(message: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Straight in onnxruntime, in the model's own opset, through none of our code."""
    session = ort.InferenceSession(message.SerializeToString(), session_options(threads=1))
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", OLD_FORMS)
def test_old_form_means_the_same_in_opset_21(name: str) -> None:
    opset, nodes, weights = OLD_FORMS[name]
    message = proto(f"g (float[2, 3, 4, 5] x) => (float[] y) {{ {nodes} }}", weights, opset=opset)
    message.ir_version = 4
    subject = load_model(message)
    feeds = made_up_feeds(subject)
    before = old_run(message, feeds)
    assert UpgradeOpset()(subject).modified
    assert subject.opset_imports[""] == 21
    assert_same(before, evaluate(subject, feeds))
    assert not UpgradeOpset()(subject).modified
    assert_same(before, evaluate(canonicalize(subject), feeds), terms=8)


def test_later_opsets_stay() -> None:
    subject = load_model(proto("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=23))
    assert not UpgradeOpset()(subject).modified
    assert subject.opset_imports[""] == 23


def test_training_batch_norm_is_refused() -> None:
    message = proto(
        "g (float[2, 3] x) => (float[] y, float[] m) { y, m, v, a, b = BatchNormalization(x, c, c, c, c) }",
        {"c": np.ones(3, np.float32)},
        opset=9,
    )
    with pytest.raises(UnsupportedError, match="training"):
        UpgradeOpset()(load_model(message))


def test_flattening_softmax_as_a_graph_output_keeps_its_name() -> None:
    subject = load_model(proto("g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax(x) }", opset=9))
    UpgradeOpset()(subject)
    assert [value.name for value in subject.graph.outputs] == ["y"]
    assert operators(subject) == {"Flatten": 1, "Reshape": 1, "Shape": 1, "Softmax": 1}
    assert isinstance(subject, ir.Model)
