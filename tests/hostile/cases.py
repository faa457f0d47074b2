"""Hostile model files: how each is made, and what kbitc must do with it.

A case is a function that fills an empty folder and returns the path of the model in it. `REJECT` cases must be refused
with a KbitcError whose message holds every listed word; `ACCEPT` cases must compute the same as onnxruntime does.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Make = Callable[[Path], Path]

REJECT: dict[str, tuple[Make, tuple[str, ...]]] = {}
ACCEPT: dict[str, Make] = {}


def rejected(*words: str) -> Callable[[Make], Make]:
    """The decorated case must be refused; the message holds these words."""

    def register(make: Make) -> Make:
        REJECT[make.__name__] = (make, words)
        return make

    return register


def accepted(make: Make) -> Make:
    """The decorated case must compute right."""
    ACCEPT[make.__name__] = make
    return make


def good() -> onnx.ModelProto:
    """y = relu(x W + b), x [2, 8]."""
    weight = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], "fc"),
        helper.make_node("Add", ["h", "b"], ["s"], "bias"),
        helper.make_node("Relu", ["s"], ["y"], "act"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(np.ones(4, np.float32), "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    """Write a model (or raw bytes) as model.onnx."""
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def edited(change: Callable[[onnx.ModelProto], object]) -> Make:
    """A case that is the good model with one change."""

    def make(folder: Path) -> Path:
        model = good()
        change(model)
        return save(folder, model)

    return make


def reject_edit(name: str, change: Callable[[onnx.ModelProto], object], *words: str) -> None:
    """Register a one-line case."""
    REJECT[name] = (edited(change), words)


# Files that are no model.


@rejected("does not exist")
def missing(folder: Path) -> Path:
    return folder / "nothing.onnx"


@rejected("not a regular file")
def folder_instead_of_file(folder: Path) -> Path:
    return folder


@rejected("not a regular file")
def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


@rejected("empty")
def empty_file(folder: Path) -> Path:
    return save(folder, b"")


@rejected("too small")
def six_bytes(folder: Path) -> Path:
    return save(folder, b"\x08\x08\x12\x02ab")


@rejected("Git LFS pointer")
def lfs_pointer(folder: Path) -> Path:
    return save(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


@rejected("pickle")
def pickled(folder: Path) -> Path:
    return save(folder, pickle.dumps({"weights": [1.0] * 8}))


@rejected("zip")
def torch_checkpoint(folder: Path) -> Path:
    return save(folder, b"PK\x03\x04" + bytes(64))


@rejected("not an ONNX model")
def garbage(folder: Path) -> Path:
    return save(folder, np.random.default_rng(0).bytes(4096))


@rejected("cut short")
def truncated(folder: Path) -> Path:
    return save(folder, good().SerializeToString()[:-1])


@rejected()
def no_graph(folder: Path) -> Path:
    return save(folder, onnx.ModelProto(ir_version=8, producer_name="somebody"))


@rejected("nests too deep")
def nested_beyond_protobuf(folder: Path) -> Path:
    inner = b""
    for _ in range(120):
        attribute = b"\x32" + _varint(len(inner)) + inner
        node = b"\x2a" + _varint(len(attribute)) + attribute
        inner = b"\x0a" + _varint(len(node)) + node
    return save(folder, b"\x08\x08\x3a" + _varint(len(inner)) + inner)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


# Versions and operators.
reject_edit("no_opset", lambda m: m.ClearField("opset_import"), "opset_import")
reject_edit("future_opset", lambda m: setattr(m.opset_import[0], "version", 99), "99")
reject_edit("ancient_opset", lambda m: setattr(m.opset_import[0], "version", 6), "6")
reject_edit("future_ir", lambda m: setattr(m, "ir_version", 77), "77")
reject_edit("two_opsets", lambda m: m.opset_import.append(helper.make_opsetid("", 18)), "twice")
reject_edit("unknown_operator", lambda m: setattr(m.graph.node[2], "op_type", "Frobnicate"), "Frobnicate", "act")
reject_edit("unknown_domain", lambda m: setattr(m.graph.node[2], "domain", "acme"), "acme", "act")
reject_edit("removed_operator", lambda m: setattr(m.graph.node[2], "op_type", "Upsample"), "Upsample")
reject_edit("too_few_inputs", lambda m: m.graph.node[1].input.pop(), "bias", "Add", "inputs")
reject_edit("too_many_outputs", lambda m: m.graph.node[1].output.append("extra"), "bias", "outputs")
reject_edit("required_input_left_out", lambda m: m.graph.node[1].input.__setitem__(0, ""), "bias")
reject_edit(
    "unknown_attribute", lambda m: m.graph.node[2].attribute.append(helper.make_attribute("zz", 1)), "act", "zz"
)


@rejected("absurd", "acme")
def domain_version_beyond_32_bits(folder: Path) -> Path:
    model = good()
    model.opset_import.append(helper.make_opsetid("acme", 1 << 40))
    return save(folder, model)


@rejected("UTF-8", "op_type")
def operator_name_that_is_no_text(folder: Path) -> Path:
    return save(folder, good().SerializeToString().replace(b"MatMul", b"Mat\xe8ul"))


@rejected("UTF-8", "name")
def tensor_name_that_is_no_text(folder: Path) -> Path:
    model = good()
    model.graph.initializer[1].name = "needle"
    return save(folder, model.SerializeToString().replace(b"needle", b"need\xffe"))


@rejected("approximate", "act")
def attribute_that_is_no_text(folder: Path) -> Path:
    model = good()
    model.opset_import[0].version = 20
    model.graph.node[2].CopyFrom(helper.make_node("Gelu", ["s"], ["y"], "act", approximate="none"))
    model.graph.node[2].attribute[0].s = b"no\xe8e"
    return save(folder, model)


@rejected("axis", "FLOAT")
def attribute_of_the_wrong_type(folder: Path) -> Path:
    model = good()
    model.graph.node[2].CopyFrom(helper.make_node("Softmax", ["s"], ["y"], "act", axis=1.0))
    return save(folder, model)


@rejected("'to'", "act")
def required_attribute_missing(folder: Path) -> Path:
    model = good()
    model.graph.node[2].CopyFrom(helper.make_node("Cast", ["s"], ["y"], "act"))
    return save(folder, model)


@rejected("calls itself", "Loop1")
def recursive_function(folder: Path) -> Path:
    model = good()
    body = [helper.make_node("Loop1", ["a"], ["c"], domain="me")]
    imports = [helper.make_opsetid("me", 1)]
    model.functions.append(helper.make_function("me", "Loop1", ["a"], ["c"], body, imports))
    model.opset_import.append(helper.make_opsetid("me", 1))
    return save(folder, model)


@rejected("calls itself")
def mutually_recursive_functions(folder: Path) -> Path:
    model = good()
    imports = [helper.make_opsetid("me", 1)]
    for name, other in (("A", "B"), ("B", "A")):
        body = [helper.make_node(other, ["a"], ["c"], domain="me")]
        model.functions.append(helper.make_function("me", name, ["a"], ["c"], body, imports))
    model.opset_import.append(helper.make_opsetid("me", 1))
    return save(folder, model)


# Names.
reject_edit("dangling_input", lambda m: m.graph.node[1].input.__setitem__(0, "ghost"), "ghost", "bias")
reject_edit("missing_initializer", lambda m: m.graph.initializer.pop(0), "W", "fc")
reject_edit("missing_output", lambda m: setattr(m.graph.output[0], "name", "nope"), "nope")
reject_edit("no_outputs", lambda m: m.graph.ClearField("output"), "outputs")
reject_edit("two_inputs_one_name", lambda m: m.graph.input.append(m.graph.input[0]), "x")
reject_edit("two_outputs_one_name", lambda m: m.graph.output.append(m.graph.output[0]), "y")
reject_edit("two_weights_one_name", lambda m: m.graph.initializer.append(m.graph.initializer[0]), "W")
reject_edit("two_producers", lambda m: m.graph.node[1].output.__setitem__(0, "h"), "h")
reject_edit("node_overwrites_input", lambda m: m.graph.node[0].output.__setitem__(0, "x"), "x", "fc")
reject_edit("cycle", lambda m: m.graph.node[0].input.__setitem__(0, "s"), "cycle", "fc")
reject_edit("nameless_weight", lambda m: setattr(m.graph.initializer[0], "name", ""), "no name")


# Types and shapes.
def _input_type(kind: onnx.TypeProto) -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.input[0].type.CopyFrom(kind)


_FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, [8])
reject_edit(
    "complex_input", _input_type(helper.make_tensor_type_proto(TensorProto.COMPLEX64, [2, 8])), "complex64", "x"
)
reject_edit("string_input", _input_type(helper.make_tensor_type_proto(TensorProto.STRING, [2, 8])), "string", "x")
reject_edit("sequence_input", _input_type(helper.make_sequence_type_proto(_FLOATS)), "sequence", "x")
reject_edit("optional_input", _input_type(helper.make_optional_type_proto(_FLOATS)), "optional", "x")
reject_edit("untyped_input", lambda m: m.graph.input[0].ClearField("type"), "x", "type")
reject_edit("unknown_rank", lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "x", "--shape")
reject_edit("rank_9", _input_type(helper.make_tensor_type_proto(TensorProto.FLOAT, [1] * 9)), "rank 9")
reject_edit("wrong_inner_size", _input_type(helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 7])), "fc")
reject_edit("wrong_declared_type", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 7))
reject_edit(
    "lying_value_info",
    lambda m: m.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 99])),
    "99",
)


@rejected("GB", "act")
def value_of_a_terabyte(folder: Path) -> Path:
    model = good()
    node = helper.make_node("Expand", ["s", "big"], ["y"], "act")
    model.graph.node[2].CopyFrom(node)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 18, 2, 4], np.int64), "big"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return save(folder, model)


@rejected("act", "channels")
def conv_channels(folder: Path) -> Path:
    return save(folder, conv_model([1, 3, 8, 8], (4, 5, 3, 3)))


@rejected("act", "group")
def conv_group(folder: Path) -> Path:
    return save(folder, conv_model([1, 3, 8, 8], (4, 1, 3, 3), group=3))


def conv_model(data: list[int], weight: tuple[int, ...], **attributes: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "W"], ["y"], "act", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, data)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(weight, np.float32), "W")],
    )
    graph.output[0].type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
    for _ in data:
        graph.output[0].type.tensor_type.shape.dim.add()
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# Odd but right.
ACCEPT["good"] = edited(lambda model: None)
ACCEPT["nodes_out_of_order"] = edited(lambda m: m.graph.node.append(m.graph.node.pop(0)))
ACCEPT["no_node_names"] = edited(lambda m: [node.ClearField("name") for node in m.graph.node])
ACCEPT["unused_input"] = edited(
    lambda m: m.graph.input.append(helper.make_tensor_value_info("unused", TensorProto.INT64, [3]))
)
ACCEPT["weight_listed_as_input"] = edited(
    lambda m: m.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [8, 4]))
)
ACCEPT["output_without_shape"] = edited(lambda m: m.graph.output[0].type.tensor_type.ClearField("shape"))
ACCEPT["negative_batch_dim"] = edited(
    lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1)
)
ACCEPT["odd_symbol"] = edited(
    lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "batch size (max-2)")
)
ACCEPT["middle_is_an_output"] = edited(
    lambda m: m.graph.output.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [2, 4]))
)
ACCEPT["weight_is_an_output"] = edited(
    lambda m: m.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [4]))
)


@accepted
def strange_names(folder: Path) -> Path:
    names = {"x": "../x\n%s", "h": "a.b", "s": "a/b", "y": "a_b", "W": "'; rm -rf\0"[:-1], "b": "é" * 2000}
    model = good()
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [names[name] for name in field]
    for item in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        item.name = names[item.name]
    return save(folder, model)


@accepted
def zero_rows(folder: Path) -> Path:
    model = good()
    for item in (model.graph.input[0], model.graph.output[0]):
        item.type.tensor_type.shape.dim[0].dim_value = 0
    return save(folder, model)


@accepted
def mask_of_infinities(folder: Path) -> Path:
    model = good()
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)[:2]
    model.graph.node[2].CopyFrom(helper.make_node("Add", ["s", "mask"], ["masked"], "mask_add"))
    model.graph.node.append(helper.make_node("Softmax", ["masked"], ["y"], "act"))
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    return save(folder, model)


@accepted
def weight_in_a_constant_node(folder: Path) -> Path:
    model = good()
    weight = model.graph.initializer.pop(0)
    weight.name = ""
    model.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value=weight))
    return save(folder, model)
