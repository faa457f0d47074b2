"""LSTM, GRU and RNN as plain operators: onnxruntime gives the same for both, for every attribute and optional input."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from kbitc.errors import ModelError
from kbitc.graph.evaluate import evaluate
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, WIDTH, SIZE = 5, 3, 7, 4
LENGTHS = np.array([5, 2, 3], np.int32)
# Sums of at most WIDTH + SIZE products, and STEPS steps whose derivative is at most 1 in each of the four gates.
TOLERANCE = 4 * STEPS * (WIDTH + SIZE) * 2.0**-24 * 4


def recurrent(kind: str, *, steps: int | str = STEPS, given: str = "B", **attributes: Any) -> onnx.ModelProto:
    """One node with random weights. given: which of B, lengths (l), initial states (s) and peepholes (P) it has."""
    random, gates = np.random.default_rng(1), GATES[kind]
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    arrays = {
        "W": random.normal(size=(count, gates * SIZE, WIDTH)) / 2,
        "R": random.normal(size=(count, gates * SIZE, SIZE)) / 2,
        "B": random.normal(size=(count, 2 * gates * SIZE)),
        "h": random.normal(size=(count, BATCH, SIZE)),
        "c": random.normal(size=(count, BATCH, SIZE)),
        "P": random.normal(size=(count, 3 * SIZE)),
    }
    letters = {"B": "B", "lengths": "l", "h": "s", "c": "s", "P": "P"}
    names = ["W", "R", "B", "lengths", "h", *(["c", "P"] if kind == "LSTM" else [])]
    inputs = ["x", *(name if letters.get(name, name) in given + "WR" else "" for name in names)]
    outputs = ["y", "last", *(["cell"] if kind == "LSTM" else [])]
    node = helper.make_node(kind, inputs, outputs, "cell_node", hidden_size=SIZE, **attributes)
    tensors = [numpy_helper.from_array(np.asarray(arrays[n], np.float32), n) for n in inputs if n in arrays]
    if "l" in given:
        tensors.append(numpy_helper.from_array(LENGTHS, "lengths"))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [steps, BATCH, WIDTH])
    made = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "g", [x], made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


CASES = [
    (kind, given, attributes)
    for kind, letters in (("LSTM", "BlsP"), ("GRU", "Bls"), ("RNN", "Bls"))
    for given, attributes in (
        ("", {}),
        (letters, {"direction": "bidirectional"}),
        ("Bl", {"direction": "reverse"}),
        ("Bs", {"clip": 0.5}),
    )
] + [
    ("GRU", "Bls", {"linear_before_reset": 1, "direction": "bidirectional"}),
    ("GRU", "B", {"linear_before_reset": 1}),
    ("LSTM", "BsP", {"input_forget": 1}),
    ("LSTM", "Bs", {"activations": ["HardSigmoid", "Softsign", "Relu"], "activation_alpha": [0.3],
                    "activation_beta": [0.4]}),
    ("GRU", "Bs", {"activations": ["Sigmoid", "LeakyRelu"], "activation_alpha": [0.2]}),
    ("RNN", "Bs", {"activations": ["Affine", "ScaledTanh"], "activation_alpha": [0.5, 0.7],
                   "activation_beta": [0.1, 0.9], "direction": "bidirectional"}),
    ("RNN", "B", {"activations": ["Elu"], "activation_alpha": [0.5]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "attributes"), CASES)
def test_onnxruntime_gives_the_same(kind: str, given: str, attributes: dict[str, Any]) -> None:
    proto = recurrent(kind, given=given, **attributes)
    feeds = {"x": np.random.default_rng(2).normal(size=(STEPS, BATCH, WIDTH)).astype(np.float32)}
    expected = evaluate(load_model(proto), feeds)
    model = canonicalize(load_model(proto))
    assert kind not in Counter(node.op_type for node in model.graph)
    found = evaluate(model, feeds)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.abs(found[name] - array).max() <= TOLERANCE * max(1, np.abs(array).max()), name


def test_all_steps_read_the_same_weights() -> None:
    """W once for all steps, R once a step but the first, whose state is 0; nothing is left to compute from weights."""
    model = canonicalize(load_model(recurrent("LSTM", direction="bidirectional", given="B")))
    products = [node for node in model.graph if node.op_type == "MatMul"]
    weights = Counter(str(node.inputs[1].name) for node in products if node.inputs[1] is not None)
    assert sorted(weights.values()) == [1, 1, STEPS - 1, STEPS - 1]
    assert all(name in model.graph.initializers for name in weights)


def test_a_first_step_without_state_costs_no_product() -> None:
    model = canonicalize(load_model(recurrent("GRU", steps=1)))
    assert Counter(node.op_type for node in model.graph)["MatMul"] == 1


@pytest.mark.parametrize(("kind", "given", "attributes"), CASES)
def test_a_sequence_of_open_length_is_scanned(kind: str, given: str, attributes: dict[str, Any]) -> None:
    """The same with a length that is only known at run time, where the batch is known."""
    proto = recurrent(kind, steps="T", given=given, **attributes)
    feeds = {"x": np.random.default_rng(2).normal(size=(STEPS, BATCH, WIDTH)).astype(np.float32)}
    expected = evaluate(load_model(proto), feeds)
    model = canonicalize(load_model(proto))
    counts = Counter(node.op_type for node in model.graph)
    assert kind not in counts and counts["Scan"] == (2 if attributes.get("direction") == "bidirectional" else 1)
    found = evaluate(model, feeds)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.abs(found[name] - array).max() <= TOLERANCE * max(1, np.abs(array).max()), name


@pytest.mark.parametrize(("steps", "kind"), [(16, "MatMul"), (17, "Scan")])
def test_few_steps_are_unrolled(steps: int, kind: str) -> None:
    model = canonicalize(load_model(recurrent("RNN", steps=steps)))
    assert Counter(node.op_type for node in model.graph)[kind] == (steps if kind == "MatMul" else 1)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ModelError, match="cell_node.*swish"):
        canonicalize(load_model(recurrent("RNN", activations=["Swish"])))
