"""Convolutions of a fixed height and an open width, as text recognisers have them: too few rows means none at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import kbitc
from kbitc.graph.evaluate import Session
from kbitc.importer import load_model

CHANNELS = 32


def strip() -> onnx.ModelProto:
    """A convolution of [1, 32, 16, width], whose rows come 16 at a time; integers, so that sums are exact."""
    weight = np.random.default_rng(0).integers(-8, 9, (24, CHANNELS, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4, strides=[1, 2])
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, CHANNELS, 16, "width"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 24, 16, "out"])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("scheme", ["float32", "int4:b32"])
def test_a_convolution_of_open_width_compiles_and_agrees(scheme: str, tmp_path: Path) -> None:
    """The compilation holds the module to the quantized ONNX at one width; here the float build at others."""
    kbitc.compile(strip(), tmp_path / "m.kbit", scheme=scheme)
    module = kbitc.load(tmp_path / "m.kbit")
    session = Session(load_model(strip()))
    for width in (1, 2, 17):
        x = np.random.default_rng(width).integers(-8, 9, (1, CHANNELS, 16, width)).astype(np.float32)
        expected, found = session.run({"x": x})["y"], module({"x": x})["y"]
        assert found.shape == expected.shape
        assert scheme != "float32" or np.array_equal(found, expected)
