"""Models compiled for CUDA and run on the emulated GPU, through TVM's own CUDA runtime, against onnxruntime and x86."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.targets.cuda.emulator import models
from tests.targets.cuda.emulator.emulator import Emulator

Feeds = dict[str, npt.NDArray[Any]]

ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[B, S, 24] x, float[1, 3, 8, 5] k) => (float[B, 3, S, 5] y, float[B, S, 24] n)
<float[24] scale, float[24] shift>
{
  split = Constant <value_ints = [0, 0, 3, 8]> ()
  heads = Reshape (x, split)
  q = Transpose <perm = [0, 2, 1, 3]> (heads)
  s = MatMul (q, k)
  y = Softmax <axis = -1> (s)
  n = LayerNormalization <axis = -1> (x, scale, shift)
}
"""
CONVOLUTIONS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 6, H, W] x) => (float[1, 10, h, w] y)
<float[12, 6, 3, 3] w1, float[12] b1, float[12, 1, 3, 3] w2, float[12, 4, 1, 1] w3, float[10, 12, 1, 1] w4>
{
  a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu (a)
  d = Conv <kernel_shape = [3, 3], pads = [2, 2, 2, 2], dilations = [2, 2], group = 12> (r, w2)
  e = Conv <kernel_shape = [1, 1], group = 3> (d, w3)
  p = MaxPool <kernel_shape = [2, 2], strides = [1, 1]> (e)
  y = Conv <kernel_shape = [1, 1]> (p, w4)
}
"""
WIDE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 40, H, W] x) => (float[1, 17, h, w] y)
<float[48, 40, 3, 3] w1, float[48] b1, float[17, 48, 1, 1] w2>
{
  a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu (a)
  y = Conv <kernel_shape = [1, 1]> (r, w2)
}
"""
EMBEDDING = """
<ir_version: 10, opset_import: ["" : 21]>
g (int64[B, S] ids) => (float[B, S, 17] y, float[B, 40] m)
<float[50, 40] table, float[40, 17] weight, int64[1] one>
{
  rows = Gather <axis = 0> (table, ids)
  y = MatMul (rows, weight)
  m = ReduceMean <keepdims = 0> (rows, one)
}
"""

# Weights of the state small enough that a step makes a smaller error of an error in it.
RECURRENCE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[T, 2, 24] x) => (float[T, 1, 2, 16] y)
<float[1, 16, 24] w, float[1, 16, 16] r, float[1, 32] b>
{
  sixteen = Constant <value = float {16.0}> ()
  small = Div (r, sixteen)
  y = RNN <hidden_size = 16> (x, w, small, b)
}
"""


def made(text: str, tmp_path: Path) -> str:
    """The model with random weights, in a file."""
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(text)
    for info in model.graph.value_info:
        shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        integer = info.type.tensor_type.elem_type == onnx.TensorProto.INT64
        array = np.ones(shape, np.int64) if integer else rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    del model.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return str(path)


def worst(path: str, scheme: str | None, activations: str, feeds: Feeds) -> tuple[float, list[str]]:
    """In the emulator: largest difference to onnxruntime relative to the largest output, and the rules used."""
    model = models.quantized_model(path, scheme, activations, {})
    outputs, layers = models.run(model, feeds)
    right = models.reference(model, feeds)
    differences = []
    for name, value in right.items():
        assert outputs[name].shape == value.shape and outputs[name].dtype == value.dtype
        differences.append(float(np.abs(outputs[name] - value).max() / np.abs(value).max()))
    return max(differences), [layer["rule"] for layer in layers]


def against_x86(path: str, scheme: str, feeds: Feeds) -> list[str]:
    """In the emulator: names of codes and accumulators that differ from those of x86."""
    from kbitc.bundle.runtime import load_built
    from kbitc.targets.build import build
    from kbitc.targets.target import parse_target

    model = models.quantized_model(path, scheme, "dynamic", {})
    ours, _ = models.run(model, feeds, debug=True)
    built = build(model, parse_target("x86:avx2"), debug_accumulators=True)
    theirs = load_built(built.library, built.weights, built.inputs, built.outputs)(dict(feeds))
    debug = [name for name in theirs if name.endswith((".codes", ".accumulators"))]
    assert debug
    return [name for name in debug if not np.array_equal(ours[name], theirs[name])]


# float32 sums of up to 54 terms in another order than onnxruntime's, through three layers.
FLOAT_TOLERANCE = 3 * 54 * 2.0**-23


def test_attention_with_symbolic_shapes(emulator: Emulator, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = made(ATTENTION, tmp_path)
    shapes = {"x": (2, 7, 24), "k": (1, 3, 8, 5)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    error, rules = emulator.run(worst, path, None, "float", feeds)
    assert error < FLOAT_TOLERANCE and rules == ["float_product"]


@pytest.mark.parametrize("scheme", [None, "uint3:b16:zp", pytest.param("nf4:c", marks=pytest.mark.slow)])
def test_convolutions_with_float_activations(emulator: Emulator, tmp_path: Path, scheme: str | None) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 6, 13, 10)).astype(np.float32)}
    error, rules = emulator.run(worst, made(CONVOLUTIONS, tmp_path), scheme, "float", feeds)
    assert error < FLOAT_TOLERANCE
    assert rules == ["float_product", "grouped_convolution", "grouped_convolution", "float_product"]


@pytest.mark.parametrize(("scheme", "length"), [("nf4:b32", 1), ("uint5:c:zp", 19), ("int1:b16", 7)])
def test_embedding_and_product_with_float_activations(
    emulator: Emulator, tmp_path: Path, scheme: str, length: int
) -> None:
    ids = np.random.default_rng(2).integers(-50, 50, (2, length))
    error, rules = emulator.run(worst, made(EMBEDDING, tmp_path), scheme, "float", {"ids": ids})
    assert error < FLOAT_TOLERANCE and rules == ["embedding", "float_product"]


@pytest.mark.parametrize("scheme", ["int4:b32", pytest.param("uint6:b16:zp", marks=pytest.mark.slow)])
def test_codes_and_accumulators_equal_those_of_x86(emulator: Emulator, tmp_path: Path, scheme: str) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 40, 13, 10)).astype(np.float32)}
    assert emulator.run(against_x86, made(WIDE, tmp_path), scheme, feeds) == []
    ids = np.random.default_rng(2).integers(0, 50, (2, 9))
    assert emulator.run(against_x86, made(EMBEDDING, tmp_path), scheme, {"ids": ids}) == []


@pytest.mark.slow
def test_a_loop_of_open_length_runs(emulator: Emulator, tmp_path: Path) -> None:
    """The condition that ends it is computed on the device and read on the host."""
    feeds = {"x": np.random.default_rng(0).standard_normal((11, 2, 24)).astype(np.float32)}
    error, rules = emulator.run(worst, made(RECURRENCE, tmp_path), None, "float", feeds)
    assert error < FLOAT_TOLERANCE and rules == ["float_product"] * 2


@pytest.mark.slow
def test_classifier_runs_and_agrees(emulator: Emulator, models_dir: Callable[[str], Path]) -> None:
    path = models_dir("ocr") / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 48, 192)).astype(np.float32)}
    error, _ = emulator.run(worst, str(path), None, "float", feeds)
    assert error < 1e-5
    _, rules = emulator.run(worst, str(path), "int4:b32", "dynamic", feeds)
    assert "integer_product" in rules


def digests_of_integers(name: str) -> tuple[str, str]:
    """In the emulator: SHA-256 over every integer tensor of a static model, here and on the reference."""
    from tests.targets.lower.test_integer import MODELS, digest, tensors

    make, feeds = MODELS[name]
    outputs, _ = models.run(make(), feeds(), debug=True)
    return digest(outputs), digest(tensors(name, "reference"))


@pytest.mark.parametrize("name", ["convolutional", pytest.param("transformer", marks=pytest.mark.slow)])
def test_static_models_give_the_same_integers(emulator: Emulator, name: str) -> None:
    ours, reference = emulator.run(digests_of_integers, name)
    assert ours == reference
