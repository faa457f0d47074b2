"""Hostile external data: the weight W of the good model lies in a file, and something is wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.hostile.cases import ACCEPT, REJECT, good, save

Fields = dict[str, str]
Prepare = Callable[[Path, bytes], Fields]


def outside(prepare: Prepare) -> Callable[[Path], Path]:
    """A case: `prepare` puts the bytes of W somewhere in the folder and returns the entries of external_data."""

    def make(folder: Path) -> Path:
        inner = folder / "inner"
        inner.mkdir()
        model = good()
        tensor = model.graph.initializer[0]
        point_to(tensor, prepare(inner, tensor.raw_data))
        return save(inner, model)

    return make


def point_to(tensor: TensorProto, fields: Fields) -> None:
    """Make a tensor external."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in fields.items():
        tensor.external_data.add(key=key, value=text)


def write(name: str = "w.bin", **fields: str) -> Prepare:
    """W in a file of its own, with these further entries."""

    def prepare(folder: Path, data: bytes) -> Fields:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return {"location": name, **fields}

    return prepare


def at(location: str) -> Prepare:
    """W beside the model's folder, reached by `location`."""

    def prepare(folder: Path, data: bytes) -> Fields:
        (folder.parent / "secret.bin").write_bytes(data)
        return {"location": location}

    return prepare


def symbolic_link(folder: Path, data: bytes) -> Fields:
    (folder.parent / "secret.bin").write_bytes(data)
    (folder / "w.bin").symlink_to("../secret.bin")
    return {"location": "w.bin"}


def linked_folder(folder: Path, data: bytes) -> Fields:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "w.bin").write_bytes(data)
    (folder / "sub").symlink_to("../elsewhere")
    return {"location": "sub/w.bin"}


def hard_link(folder: Path, data: bytes) -> Fields:
    (folder.parent / "secret.bin").write_bytes(data)
    os.link(folder.parent / "secret.bin", folder / "w.bin")
    return {"location": "w.bin"}


def fifo(folder: Path, data: bytes) -> Fields:
    os.mkfifo(folder / "w.bin")
    return {"location": "w.bin"}


def cut_short(folder: Path, data: bytes) -> Fields:
    (folder / "w.bin").write_bytes(data[:100])
    return {"location": "w.bin"}


def with_offset(folder: Path, data: bytes) -> Fields:
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(bytes(4096) + data + bytes(3))
    return {"location": "sub/w.bin", "offset": "4096", "length": "128"}


def with_checksum(folder: Path, data: bytes) -> Fields:
    (folder / "w.bin").write_bytes(data)
    return {"location": "./w.bin", "checksum": hashlib.sha1(data).hexdigest()}


REJECT_EXTERNAL: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "dotdot": (at("../secret.bin"), ("W", "../")),
    "nested_dotdot": (at("sub/../../secret.bin"), ("W",)),
    "backslashes": (at("..\\secret.bin"), ("W",)),
    "drive_letter": (at("C:/secret.bin"), ("W",)),
    "absolute": (at("/etc/passwd"), ("W", "/etc/passwd")),
    "empty_location": (at(""), ("W", "empty")),
    "nul_byte": (at("w.bin\0.txt"), ("W", "NUL")),
    "absent": (at("nowhere.bin"), ("W", "nowhere.bin", "exist")),
    "the_folder": (at("."), ("W",)),
    "symbolic_link": (symbolic_link, ("W", "w.bin", "link")),
    "linked_folder": (linked_folder, ("W", "link")),
    "hard_link": (hard_link, ("W", "hard link")),
    "fifo": (fifo, ("W", "regular")),
    "cut_short": (cut_short, ("W", "w.bin", "100")),
    "length_too_small": (write(length="64"), ("W", "64", "128")),
    "length_bomb": (write(length=str(2**62)), ("W", "length")),
    "offset_bomb": (write(offset=str(2**40)), ("W", "offset")),
    "offset_overflow": (write(offset=str(2**64 - 64)), ("W", "offset")),
    "offset_text": (write(offset="0x10"), ("W", "offset")),
    "offset_negative": (write(offset="-4"), ("W", "offset")),
    "unknown_key": (write(__class__="os.system"), ("W", "__class__")),
    "wrong_checksum": (write(checksum="0" * 40), ("W", "checksum")),
}
ACCEPT_EXTERNAL: dict[str, Prepare] = {
    "plain": write(),
    "subfolder": write("sub/w.bin"),
    "offset": with_offset,
    "checksum": with_checksum,
}

for _name, (_prepare, _words) in REJECT_EXTERNAL.items():
    REJECT[f"external_{_name}"] = (outside(_prepare), _words)
for _name, _prepare in ACCEPT_EXTERNAL.items():
    ACCEPT[f"external_{_name}"] = outside(_prepare)


def escape_in_constant_node(folder: Path) -> Path:
    """The same escape, from the tensor inside a Constant node of a branch."""
    (folder / "secret.bin").write_bytes(bytes(16))
    (folder / "inner").mkdir()
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4])
    point_to(tensor, {"location": "../secret.bin"})
    branches = {}
    for name in ("then_branch", "else_branch"):
        nodes = [helper.make_node("Constant", [], ["k" + name], value=tensor)]
        out = helper.make_tensor_value_info("k" + name, TensorProto.FLOAT, [4])
        branches[name] = helper.make_graph(nodes, name, [], [out])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "branch", **branches)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return save(folder / "inner", model)


REJECT["external_in_a_branch"] = (escape_in_constant_node, ("k", "../"))
