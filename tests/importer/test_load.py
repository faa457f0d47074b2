"""Import of sound models: shapes bound, symbols kept, weights shared with the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kbitc.errors import KbitcError, ModelError, UsageError
from kbitc.graph.edit import constant
from kbitc.graph.evaluate import evaluate
from kbitc.graph.text import model_text
from kbitc.importer import load_model
from kbitc.importer.files import write_model
from kbitc.importer.signature import parse_constant, parse_shape
from tests.support.onnx_text import model, noise, proto


def dims(value: object) -> list[int | str | None]:
    shape = value.shape  # type: ignore[attr-defined]
    return [dim if isinstance(dim, int) else dim.value for dim in shape.dims]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x=1x3x224x224", ("x", (1, 3, 224, 224))),
        ("x=1,3,8", ("x", (1, 3, 8))),
        ("a=b=4", ("a=b", (4,))),
        ("x=?x3xW", ("x", (None, 3, "W"))),
        ("sr=", ("sr", ())),
    ],
)
def test_shape_texts(text: str, wanted: object) -> None:
    assert parse_shape(text) == wanted


@pytest.mark.parametrize("text", ["x", "=1x2", "x=1x-3", "x=0", "x=1xx2", "x=1.5", "x=" + "9" * 12, "x=2x3 4"])
def test_bad_shape_texts(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shape(text)


TWO = "g (float[N, S] a, float[N, S] b) => (float[] y) { y = Add(a, b) }"


def test_a_symbol_is_bound_wherever_it_occurs() -> None:
    subject = load_model(proto(TWO), shapes={"a": (4, None)})
    assert [dims(value) for value in subject.graph.inputs] == [[4, "S"], [4, "S"]]
    assert dims(subject.graph.outputs[0]) == [4, "S"]


def test_renamed_and_anonymous_dims() -> None:
    message = proto(TWO)
    message.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "?"
    subject = load_model(message, shapes={"a": ("batch", None)})
    assert [dims(value) for value in subject.graph.inputs] == [["batch", "S"], ["batch", "b_dim_1"]]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"aa": (1, 2)}, ("'aa'", "'a'")),
        ({"a": (1, 2, 3)}, ("a", "3 dims", "2")),
        ({"a": (1, 2), "b": (3, 2)}, ("N = 1 and 3",)),
    ],
)
def test_bindings_that_do_not_fit(shapes: dict[str, tuple[int, ...]], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(proto(TWO), shapes=shapes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_fixed_dim_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="contradicts"):
        load_model(proto("g (float[2, S] x) => (float[] y) { y = Relu(x) }"), shapes={"x": (3, 4)})


def test_a_bound_rank() -> None:
    message = proto("g (float[] x) => (float[] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="--shape x="):
        load_model(message)
    assert dims(load_model(message, shapes={"x": (2, "W")}).graph.outputs[0]) == [2, "W"]


def test_the_message_is_not_changed() -> None:
    message = proto("g (float[2, 300] x) => (float[] y) { y = Mul(x, w) }", {"w": noise(300)})
    before = message.SerializeToString()
    load_model(message, shapes={"x": (2, 300)})
    assert message.SerializeToString() == before


def test_external_data_is_mapped_not_copied(tmp_path: Path) -> None:
    graph, weights = "g (float[2, 64] x) => (float[] y) { y = MatMul(x, w) }", {"w": noise(64, 32)}
    message = proto(graph, weights)
    path = tmp_path / "m.onnx"
    onnx.save(message, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    subject = load_model(path)
    weight = constant(subject.graph.initializers["w"])
    base = weight
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert "mmap" in type(base.base).__name__ or isinstance(base.base, memoryview)
    assert not weight.flags.writeable
    np.testing.assert_array_equal(weight, noise(64, 32))
    x = noise(2, 64)
    np.testing.assert_array_equal(evaluate(subject, {"x": x})["y"], evaluate(model(graph, weights), {"x": x})["y"])


@pytest.mark.parametrize("kind", ["float_data", "int32_data", "int64_data", "double_data", "int4", "bool"])
def test_every_way_to_store_a_tensor(kind: str) -> None:
    types = {
        "float_data": (TensorProto.FLOAT, [1.5, -2.5, 3.0]), "int32_data": (TensorProto.INT8, [1, -2, 3]),
        "int64_data": (TensorProto.INT64, [1, -2, 3]), "double_data": (TensorProto.DOUBLE, [1.5, -2.5, 3.0]),
        "int4": (TensorProto.INT4, [1, -2, 3]), "bool": (TensorProto.BOOL, [1, 0, 1]),
    }  # fmt: skip
    elem_type, numbers = types[kind]
    message = proto("g (float[3] x) => (float[] y) { c = Cast<to = 1>(w) \n y = Add(x, c) }")
    message.graph.initializer.append(helper.make_tensor("w", elem_type, [3], numbers))
    found = evaluate(load_model(message), {"x": np.zeros(3, np.float32)})["y"]
    np.testing.assert_array_equal(found, np.asarray(numbers, np.float32))


def test_large_initializers_survive_the_detour() -> None:
    """Tensors over 1 KiB leave the message during the checks and come back bit for bit."""
    weight = noise(40, 40)
    subject = model("g (float[2, 40] x) => (float[] y) { y = MatMul(x, w) }", {"w": weight})
    np.testing.assert_array_equal(constant(subject.graph.initializers["w"]), weight)


def test_written_models_are_read_back(tmp_path: Path) -> None:
    subject = model("g (float[2, 40] x) => (float[] y) { y = MatMul(x, w) }", {"w": noise(40, 40)})
    path = tmp_path / "out.onnx"
    assert write_model(subject, path) == path.stat().st_size
    assert model_text(load_model(path)) == model_text(subject)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    write_model(subject, tmp_path / "again.onnx")
    assert path.read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_constants_of_all_spellings_become_initializers() -> None:
    graph = """g (float[2] x) => (float[] y) {
        a = Constant<value_float = 2.0>() \n b = Constant<value = float {3.0}>() \n c = Mul(x, a) \n y = Add(c, b)
    }"""
    found = evaluate(model(graph), {"x": np.ones(2, np.float32)})["y"]
    np.testing.assert_array_equal(found, [5, 5])


def test_weight_given_as_input_needs_no_feed() -> None:
    message = proto("g (float[2] x, float[2] w) => (float[] y) { y = Add(x, w) }")
    message.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    subject = load_model(message)
    assert [value.name for value in subject.graph.inputs] == ["x"]
    np.testing.assert_array_equal(evaluate(subject, {"x": np.ones(2, np.float32)})["y"], [2, 2])


RATED = "g (float[2, S] x, int64 sr) => (float[2, S] y) { f = Cast<to = 1>(sr) \n y = Mul(x, f) }"


@pytest.mark.parametrize(("text", "wanted"), [("sr=16000", ("sr", 16000.0)), ("a=b=-0.5", ("a=b", -0.5))])
def test_constant_texts(text: str, wanted: object) -> None:
    assert parse_constant(text) == wanted


@pytest.mark.parametrize("text", ["sr", "=3", "sr=", "sr=1x2", "sr=nan", "sr=inf", ""])
def test_bad_constant_texts(text: str) -> None:
    with pytest.raises(UsageError, match="--constant needs NAME=NUMBER"):
        parse_constant(text)


def test_an_input_made_constant_leaves_the_signature() -> None:
    subject = load_model(proto(RATED), constants={"sr": 3})
    assert [value.name for value in subject.graph.inputs] == ["x"]
    assert np.array_equal(evaluate(subject, {"x": np.ones((2, 4), np.float32)})["y"], np.full((2, 4), 3, np.float32))


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({"srr": 3.0}, "did you mean 'sr'"),
        ({"x": 3.0}, "small known shape.*input x"),
        ({"sr": 0.5}, "0.5 as int64"),
        ({"sr": 1e30}, "1e.30 as int64"),
    ],
)
def test_constants_that_do_not_fit(constants: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_model(proto(RATED), constants=constants)


def test_a_sequence_is_no_constant() -> None:
    message = proto("g (seq(float[2]) x) => (int64 y) { y = SequenceLength(x) }")
    with pytest.raises(KbitcError):
        load_model(message, constants={"x": 1})
