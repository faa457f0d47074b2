"""Hostile tensors: numbers, sizes and types that do not add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.hostile.cases import ACCEPT, REJECT, Make, conv_model, good, reject_edit, rejected, save


def _weight(array: np.ndarray) -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "W"))


def _with(index: tuple[int, int], number: float) -> np.ndarray:
    array = np.ones((8, 4), np.float32)
    array[index] = number
    return array


reject_edit("nan_weight", _weight(_with((3, 2), np.nan)), "W", "[3, 2]", "NaN")
reject_edit("inf_weight", _weight(_with((7, 0), np.inf)), "W", "[7, 0]")
reject_edit("nan_half_weight", _weight(_with((0, 1), np.nan).astype(np.float16)), "W", "[0, 1]")
reject_edit("raw_data_short", lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(124)), "W", "124", "128")
reject_edit("raw_data_long", lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(132)), "W", "132")
reject_edit("data_given_twice", lambda m: m.graph.initializer[0].float_data.extend([1.0] * 32), "W", "twice")
reject_edit("negative_dim", lambda m: m.graph.initializer[0].dims.__setitem__(0, -8), "W", "negative")
reject_edit("overflowing_dims", lambda m: m.graph.initializer[0].dims.extend([1 << 62, 1 << 62]), "W", "too large")
reject_edit("rank_bomb", lambda m: m.graph.initializer[0].dims.extend([1] * 100_000), "W", "rank")
reject_edit("typeless_tensor", lambda m: setattr(m.graph.initializer[0], "data_type", 0), "W")
reject_edit("unknown_tensor_type", lambda m: setattr(m.graph.initializer[0], "data_type", 99), "W", "99")
reject_edit("complex_tensor", lambda m: setattr(m.graph.initializer[0], "data_type", 14), "W", "complex64")


@rejected("var", "negative")
def negative_variance(folder: Path) -> Path:
    model = conv_model([1, 3, 8, 8], (4, 3, 1, 1))
    model.graph.node[0].output[0] = "c"
    norm = helper.make_node("BatchNormalization", ["c", "one", "one", "one", "var"], ["y"], "norm")
    model.graph.node.append(norm)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, -1, 1], np.float32), "var"))
    return save(folder, model)


def _dequantize(scale: np.ndarray) -> Make:
    def make(folder: Path) -> Path:
        model = good()
        node = helper.make_node("DequantizeLinear", ["q", "scale"], ["W"], "dq", axis=1)
        del model.graph.initializer[0]
        model.graph.node.insert(0, node)
        model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4), np.int8), "q"))
        model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
        return save(folder, model)

    return make


REJECT["scale_zero"] = (_dequantize(np.array([1, 0, 1, 1], np.float32)), ("scale", "dq"))
REJECT["scale_negative"] = (_dequantize(np.array(-0.5, np.float32)), ("scale", "-0.5"))
REJECT["scale_nan"] = (_dequantize(np.array(np.nan, np.float32)), ("scale", "NaN"))
REJECT["scale_of_the_wrong_length"] = (_dequantize(np.ones(3, np.float32)), ("scale", "3"))
ACCEPT["quantized_already"] = _dequantize(np.array([0.5, 1, 2, 0.25], np.float32))
