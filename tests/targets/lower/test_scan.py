"""Loops: a Scan lowered to recursion gives what onnxruntime gives, for any number of steps, float and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import kbitc
from kbitc.graph.evaluate import Session, evaluate
from kbitc.graph.functions import without_rounding
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.verify.accuracy import needed_sqnr_db
from kbitc.quant.metrics import compare
from tests.support.lowered import run_of
from tests.support.onnx_text import assert_same, model, noise

WIDTH, SIZE = 48, 40


def backward_sums() -> str:
    """Sums of the rows of x so far, from the last to the first; `total` doubles what it was and adds the row."""
    return """
g (float[T, 3] x, float[3] start) => (float[3] last, float[T, 3] sums) {
  scaled = Mul(start, two)
  last, sums = Scan<num_scan_inputs = 1, scan_input_directions = [1], scan_output_directions = [1],
    body = step (float[3] total, float[3] row) => (float[3] next, float[3] seen) {
      more = Add(row, scaled)
      next = Add(total, more)
      seen = Mul(next, two)
    }>(scaled, x)
}"""


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 100])
def test_any_number_of_steps_and_values_from_outside(steps: int) -> None:
    """The body reads a value that is computed outside; both directions are turned round."""
    subject = model(backward_sums(), {"two": np.float32(2)})
    x = np.random.default_rng(steps).integers(-8, 9, (steps, 3)).astype(np.float32)
    feeds = {"x": x, "start": np.array([1, -2, 3], np.float32)}
    expected = evaluate(subject, feeds)
    found = run_of(canonicalize(model(backward_sums(), {"two": np.float32(2)})))(feeds)
    assert_same(expected, dict(zip(expected, found, strict=True)))


def test_sizes_that_are_computed_and_symbols_named_as_the_loop_names_its_own() -> None:
    """The number of steps is half of a symbol, and the rows' width is called as a range's length is inside."""
    text = """
g (float[T, length] x) => (float[length] last, float[S, length] sums) {
  pair = Constant<value_ints = [-1, 2]>()
  width = Shape<start = 1, end = 2>(x)
  target = Concat<axis = 0>(pair, width)
  pairs = Reshape(x, target)
  rows = ReduceSum<keepdims = 0>(pairs, one)
  start = ConstantOfShape(width)
  scale = Add(width, one)
  factor = Cast<to = 1>(scale)
  last, sums = Scan<num_scan_inputs = 1,
    body = step (float[length] total, float[length] row) => (float[length] next, float[length] seen) {
      scaled = Mul(row, factor)
      next = Add(total, scaled)
      seen = Identity(next)
    }>(start, rows)
}"""
    parts = {"one": np.array([1])}
    runnable = run_of(canonicalize(model(text, parts)))
    for steps, width in ((1, 1), (3, 5), (6, 2)):
        feeds = {"x": np.random.default_rng(steps).integers(-8, 9, (2 * steps, width)).astype(np.float32)}
        expected = evaluate(model(text, parts), feeds)
        assert_same(expected, dict(zip(expected, runnable(feeds), strict=True)))


@pytest.mark.parametrize(("read", "made", "shape"), [(1, 0, "T, 2, 3"), (-2, 2, "2, 3, T"), (0, -2, "2, T, 3")])
def test_another_axis(read: int, made: int, shape: str) -> None:
    """The body sees one element without the axis that is run over."""
    series = "T, 2, 3" if read == 0 else "2, T, 3"
    text = f"""
g (float[{series}] x, float[2, 3] start) => (float[2, 3] last, float[{shape}] sums) {{
  last, sums = Scan<num_scan_inputs = 1, scan_input_axes = [{read}], scan_output_axes = [{made}],
    scan_output_directions = [1],
    body = step (float[2, 3] total, float[2, 3] row) => (float[2, 3] next, float[2, 3] seen) {{
      next = Add(total, row)
      seen = Identity(next)
    }}>(start, x)
}}"""
    sizes = (5, 2, 3) if read == 0 else (2, 5, 3)
    random = np.random.default_rng(0)
    feeds = {
        "x": random.integers(-8, 9, sizes).astype(np.float32),
        "start": random.integers(-8, 9, (2, 3)).astype(np.float32),
    }
    expected = evaluate(model(text), feeds)
    subject = canonicalize(model(text))
    assert_same(expected, evaluate(subject, feeds))
    assert_same(expected, dict(zip(expected, run_of(subject)(feeds), strict=True)))


def test_another_axis_inside_a_body() -> None:
    text = """
g (float[4, 2, 5] x, float[2] start) => (float[4, 2] lasts) {
  lasts = Scan<num_scan_inputs = 1, body = outer (float[2, 5] part) => (float[2] last) {
      last = Scan<num_scan_inputs = 1, scan_input_axes = [1],
        body = inner (float[2] total, float[2] item) => (float[2] next) { next = Add(total, item) }>(start, part)
    }>(x)
}"""
    random = np.random.default_rng(0)
    feeds = {name: random.integers(-8, 9, shape).astype(np.float32) for name, shape in (("x", (4, 2, 5)), ("start", 2))}
    expected = evaluate(model(text), feeds)
    assert_same(expected, dict(zip(expected, run_of(canonicalize(model(text)))(feeds), strict=True)))


def recurrent(kind: str) -> onnx.ModelProto:
    """A bidirectional recurrence over a sequence of open length."""
    random, gates = np.random.default_rng(0), {"LSTM": 4, "GRU": 3}[kind]
    arrays = {
        "W": random.normal(size=(2, gates * SIZE, WIDTH)) / np.sqrt(WIDTH),
        "R": random.normal(size=(2, gates * SIZE, SIZE)) / np.sqrt(SIZE),
        "B": random.normal(size=(2, 2 * gates * SIZE)) / 4,
    }
    node = helper.make_node(kind, ["x", *arrays], ["y"], "cell", hidden_size=SIZE, direction="bidirectional")
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["T", "N", WIDTH])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["T", 2, "N", SIZE])
    graph = helper.make_graph([node], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


@pytest.mark.parametrize(("kind", "scheme"), [("LSTM", "int4:b32"), ("GRU", "nf4:b32"), ("LSTM", "int3:b16")])
def test_recurrent_weights_are_quantized_and_the_module_agrees(kind: str, scheme: str, tmp_path: Path) -> None:
    """The compilation itself holds the module to its quantized ONNX on generated inputs; here on other sizes."""
    options: dict[str, Any] = {"scheme": scheme, "calibration": [{"x": noise(9, 2, WIDTH)}]}
    report = kbitc.compile(recurrent(kind), tmp_path / "m.kbit", **options)
    assert {str(weight.entry.scheme) for weight in report.weights} == {scheme}
    assert len(report.weights) == (4 if kind == "LSTM" else 6)
    assert all(weight.entry.activation == "int8" for weight in report.weights)
    module = kbitc.load(tmp_path / "m.kbit")
    quantized = kbitc.quantize(recurrent(kind), tmp_path / "m.onnx", **options)
    assert quantized.weights[0].entry.scheme is not None
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    rounded = ir.load(tmp_path / "m.onnx")
    plain = without_rounding(rounded)
    assert plain is not None
    sessions = Session(rounded), Session(plain)
    feeds = [{"x": noise(*shape, WIDTH, seed=shape[0])} for shape in ((1, 1), (6, 3), (33, 2))]
    expected, unrounded = ([session.run(feed) for feed in feeds] for session in sessions)
    rounding, lowering = compare(unrounded, expected), compare(expected, [module(feed) for feed in feeds])
    assert lowering["y"].sqnr_db >= needed_sqnr_db(rounding["y"].sqnr_db)


WAITING = """
g (float[T, 3] x, float[3] start, int8[3] codes) => (float[3] y, float[T, 3] sums) {
  scale = Abs(start)
  wide = DequantizeLinear<axis = 0>(codes, scale)
  last, sums = Scan<num_scan_inputs = 1, body = step (float[3] total, float[3] row) => (float[3] next, float[3] seen) {
      more = Add(row, wide)
      next = Add(total, more)
      seen = Neg(next)
    }>(start, x)
  y = Add(last, wide)
}"""


def test_a_value_that_waits_for_readers_is_computed_outside_the_loop() -> None:
    """It is read inside first; what a loop computes is not there outside."""
    feeds = {"x": noise(5, 3), "start": noise(3), "codes": np.array([3, -4, 5], np.int8)}
    expected = evaluate(model(WAITING), feeds)
    found = run_of(canonicalize(model(WAITING)))(feeds)
    assert_same(expected, dict(zip(expected, found, strict=True)), terms=5)
