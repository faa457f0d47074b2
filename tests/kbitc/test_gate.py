"""The gate before a bundle is written tells a wrong module from rounding noise, also where weights have few bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from kbitc import driver, options
from kbitc.bundle.runtime import load_built
from kbitc.errors import InternalError
from kbitc.passes.verify.accuracy import check_lowering, measure
from kbitc.quant.packing import pack_codes, unpack_codes
from kbitc.targets.build import Built, build
from kbitc.targets.target import parse_target

Weights = dict[str, np.ndarray]
CHANNELS, TAPS, CLASSES = (32, 64, 64), 9, 16


def _network() -> onnx.ModelProto:
    """Two 3x3 convolutions with Relu, the mean over the pixels, and a matrix."""
    random = np.random.default_rng(3)
    wide, deep, last = CHANNELS
    arrays = {
        "w0": random.normal(size=(deep, wide, 3, 3)) / np.sqrt(TAPS * wide),
        "w1": random.normal(size=(last, deep, 3, 3)) / np.sqrt(TAPS * deep),
        "w2": random.normal(size=(last, CLASSES)) / np.sqrt(last),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], keepdims=0),
        helper.make_node("MatMul", ["e", "w2"], ["y"], "third"),
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(a, np.int64 if a.dtype.kind == "i" else np.float32), name)
        for name, a in arrays.items()
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, wide, 10, 10])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(nodes, "net", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@functools.cache
def _made(bits: int) -> tuple[driver.Quantized, Built]:
    target = parse_target("host")
    chosen = options.from_arguments(bits=bits)
    prepared = driver.prepare(_network(), chosen, target, None, driver.Trace())
    plan, kinds = driver.make_plan(prepared.original, chosen, target)
    made = driver.quantize_prepared(prepared, plan, kinds, chosen, driver.Trace())
    return made, build(made.model, target)


def _name(weights: Weights, node: str, part: str) -> str:
    (name,) = (name for name in weights if name.startswith(node) and name.endswith(f".{part}"))
    return name


def _one_scale_doubled(weights: Weights, bits: int) -> Weights:
    """Channel 5, tap 4, second block of the second convolution."""
    name = _name(weights, "second", "scales")
    changed = weights[name].copy()
    changed[0, 4, 1, 5] *= 2
    return weights | {name: changed}


def _one_tap_dropped(weights: Weights, bits: int) -> Weights:
    """The last tap of the second convolution: level 0 has the code 2^(bits - 1)."""
    name = _name(weights, "second", "codes")
    n, c = CHANNELS[2], CHANNELS[1]
    codes = unpack_codes(weights[name], bits, n, c)
    codes[:, -1] = 1 << (bits - 1)
    return weights | {name: pack_codes(codes, bits)}


def _one_channel_shifted(weights: Weights, bits: int) -> Weights:
    """The activation of channel c meets the weight of channel c + 1."""
    name = _name(weights, "first", "codes")
    n, c = CHANNELS[1], CHANNELS[0]
    return weights | {name: pack_codes(np.roll(unpack_codes(weights[name], bits, n, c), 1, axis=2), bits)}


def _as_built(weights: Weights, bits: int) -> Weights:
    return weights


def _judge(bits: int, change: Callable[[Weights, int], Weights]) -> None:
    made, built = _made(bits)
    module = load_built(built.library, change(dict(built.weights), bits), built.inputs, built.outputs)
    check_lowering(measure(made.references, module))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_module_as_built_passes(bits: int) -> None:
    _judge(bits, _as_built)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("change", [_one_scale_doubled, _one_tap_dropped, _one_channel_shifted])
def test_a_wrong_module_is_refused(bits: int, change: Callable[[Weights, int], Any]) -> None:
    with pytest.raises(InternalError, match="departs from its quantized ONNX"):
        _judge(bits, change)
