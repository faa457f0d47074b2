"""Edits keep names, outputs and order; legality names every offender."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.errors import InternalError, ModelError, UnsupportedError
from kbitc.graph import edit
from kbitc.graph.evaluate import Session, evaluate, light_proto
from kbitc.graph.legality import LOWERABLE, after_import, after_rewrite, refuse_unlowerable, require
from kbitc.graph.text import model_text
from tests.support.onnx_text import model, noise


def nodes(subject: ir.Model) -> list[str]:
    return [node.op_type for node in subject.graph]


def test_replacing_an_output_keeps_its_name() -> None:
    subject = model("g (float[2] x) => (float[] y) { a = Neg(x) \n y = Relu(a) }")
    relu = list(subject.graph)[1]
    edit.replace_with(relu, "Abs", [relu.inputs[0]])
    assert nodes(subject) == ["Neg", "Abs"] and [value.name for value in subject.graph.outputs] == ["y"]
    assert evaluate(subject, {"x": np.float32([1, -2])})["y"].tolist() == [1, 2]
    assert after_import(subject) == []


@pytest.mark.parametrize("source", ["x", "a"])
def test_an_output_that_becomes_an_input_or_another_output_gets_an_identity(source: str) -> None:
    subject = model("g (float[2] x) => (float[] y, float[] a) { a = Neg(x) \n y = Relu(a) }")
    neg, relu = list(subject.graph)
    edit.replace(relu, subject.graph.inputs[0] if source == "x" else neg.outputs[0])
    assert nodes(subject) == ["Neg", "Identity"]
    assert [value.name for value in subject.graph.outputs] == ["y", "a"]
    found = evaluate(subject, {"x": np.float32([1, -2])})
    assert found["y"].tolist() == ([1, -2] if source == "x" else [-1, 2])


def test_names_are_made_unique() -> None:
    subject = model("g (float[2] x) => (float[] y) { a = Neg(x) \n y = Relu(a) }")
    relu = list(subject.graph)[1]
    first = edit.insert_before(relu, "Exp", [relu.inputs[0]], name="a")
    second = edit.add_initializer(subject.graph, "x", noise(2))
    assert first.name == "a_1" and second.name == "x_1"
    split = edit.insert_before(relu, "Split", [first], outputs=2, num_outputs=2)
    names = [value.name for value in split.producer().outputs]
    assert len(set(names)) == 2


def test_what_only_a_dead_inner_graph_reads_goes_with_it() -> None:
    """Its initializers and the nodes that feed it: onnxruntime refuses a model with weights that nothing reads."""
    weight = np.ones((64, 512), np.float32)
    subject = model(
        """g (float[64] x, bool c) => (float[64] y) {
          before = Neg(x)
          dead = If(c) <
            then_branch = then_graph () => (float[512] t) { t = MatMul(before, w) },
            else_branch = else_graph () => (float[512] e) { e = MatMul(x, w) }
          >
          y = Abs(x)
        }""",
        {"w": weight},
    )
    assert edit.remove_dead(subject)
    assert nodes(subject) == ["Abs"] and not subject.graph.initializers
    assert Session(subject).run({"x": weight[:, 0], "c": np.array(True)})["y"].shape == (64,)
    assert not edit.remove_dead(subject)


def test_constants() -> None:
    subject = model("g (float[2] x) => (float[] y) { y = Add(x, w) }", {"w": np.float32([3])})
    add = next(iter(subject.graph))
    assert edit.scalar(add.inputs[1]) == 3 and edit.constant(add.inputs[0]) is None
    assert edit.integers(add.inputs[1]) is None
    assert edit.describe(add).endswith("(Add)")
    with pytest.raises(InternalError):
        edit.root_graph(ir.Node("", "Relu", [add.outputs[0]]))


def test_unlowerable_nodes_are_listed_all_at_once() -> None:
    graph = """g (float[2, 4] x, float[1, 1, 4, 4, 4] v) => (float[] y, float[] z, float[] p) {
        y = Bernoulli(x) \n d = Det(m) \n z = Add(x, d) \n p = MaxPool<kernel_shape = [2, 2, 2]>(v)
    }"""
    subject = model(graph, {"m": noise(2, 2)})
    with pytest.raises(UnsupportedError) as caught:
        refuse_unlowerable(subject)
    message = str(caught.value)
    assert "3 nodes" in message and caught.value.exit_code == 4
    for words in ("y (Bernoulli)", "d (Det)", "p (MaxPool)", "rank 5"):
        assert words in message, message


@pytest.mark.parametrize(
    ("nodes_", "word"),
    [
        ('y = Resize<mode = "cubic">(x, , s)', "cubic"),
        ("y, i = MaxPool<kernel_shape = [1, 1]>(x) \n j = Identity(i)", "indices"),
        ('y = Pad<mode = "wrap">(x, p)', "wrap"),
    ],
)
def test_reasons(nodes_: str, word: str) -> None:
    outputs = "float[] y, int64[] j" if "j =" in nodes_ else "float[] y"
    weights = (
        {"s": np.float32([1, 1, 2, 2])} if "s)" in nodes_ else {"p": np.zeros(8, np.int64)} if "p)" in nodes_ else {}
    )
    with pytest.raises(UnsupportedError, match=word):
        refuse_unlowerable(model(f"g (float[1, 2, 4, 4] x) => ({outputs}) {{ {nodes_} }}", weights))


def test_broken_graphs_are_internal_errors() -> None:
    subject = model("g (float[2] x) => (float[] y) { a = Neg(x) \n y = Gemm(a, a) }".replace("Gemm(a, a)", "Relu(a)"))
    first, second = list(subject.graph)
    subject.graph.remove(first)
    subject.graph.insert_after(second, first)
    assert any("before the producer" in problem for problem in after_import(subject))
    with pytest.raises(InternalError, match="after folding"):
        require(after_import(subject), "folding")
    assert any("no name" in problem for problem in after_rewrite(subject)) or after_rewrite(subject)
    assert "Conv" in LOWERABLE and "If" not in LOWERABLE


def test_text_is_the_same_for_the_same_model() -> None:
    def make() -> ir.Model:
        return model("g (float[2, 9] x) => (float[] y) { y = MatMul(x, w) }", {"w": noise(9, 3)})

    text = model_text(make())
    assert text == model_text(make())
    assert hashlib.sha256(noise(9, 3).tobytes()).hexdigest()[:12] in text
    assert "y: FLOAT[2,3] = MatMul(x, w)" in text


def test_large_weights_pass_beside_the_message() -> None:
    weight = noise(200, 200)
    subject = model("g (float[2, 200] x) => (float[] y) { h = MatMul(x, w) \n y = Relu(h) }", {"w": weight})
    message, detached = light_proto(subject)
    assert message.ByteSize() < 2000 and list(detached) == ["w"]
    session = Session(subject, ["h"])
    found = session.run({"x": noise(2, 200)})
    assert list(found) == ["y", "h"]
    np.testing.assert_allclose(found["h"], noise(2, 200) @ weight, atol=200 * 2.0**-20)
    assert list(subject.graph.initializers) == ["w"]


def test_sessions_say_what_is_wrong() -> None:
    subject = model("g (float[2, 3] x) => (float[] y) { y = Relu(x) }")
    with pytest.raises(InternalError, match="ghost"):
        Session(subject, ["ghost"])
    with pytest.raises(ModelError, match="when it is run"):
        evaluate(subject, {"x": noise(3, 3)})
