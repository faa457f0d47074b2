"""Times by layer: which kernel call is which layer, what it moves and computes, and what is said of slow ones."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kbitc.bundle.manifest import REPORT
from kbitc.bundle.profile import LayerTimes, Sample, attribute, match, operations, profile, traffic
from kbitc.bundle.runtime import Model, load
from kbitc.cli import _guarded
from kbitc.commands.layers import bench_layers, layer_rows
from kbitc.errors import BundleError
from tests.support import tiny

ROWS, CHANNELS = 5, 64
BODY = """g (float[batch, 64] x) => (float[batch, 32] y) {
    p = MatMul(x, first)
    q = MatMul(x, second)
    s = Softmax <axis = -1> (p)
    y = Add(s, q)
}"""
# Seconds between two readings: calling nothing, calling a kernel, until the next call.
STEPS = (1.0, 3.0, 5.0)


class FakeClock:
    """Every kernel takes 3 seconds, one of which is the call."""

    def __init__(self) -> None:
        self.now, self.steps = 0.0, cycle((STEPS[2], *STEPS[:2]))

    def __call__(self) -> float:
        self.now += next(self.steps)
        return self.now


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(3)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {BODY}')
    for name in ("first", "second"):
        array = random.normal(size=(CHANNELS, 32)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = "node_" + node.output[0]
    path = tmp_path_factory.mktemp("layers") / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    out = model.with_name("model.kbit")
    assert _guarded(["compile", str(model), "-o", str(out), "--bits", "4"]) == 0
    return out


@pytest.fixture(scope="module")
def ready(bundle: Path) -> tuple[Model, list[Any], dict[str, Any]]:
    module = load(bundle, threads=1)
    x = np.random.default_rng(4).normal(size=(ROWS, CHANNELS)).astype(np.float32)
    return module, module.device_arguments([x]), json.loads((bundle / REPORT).read_text())


def test_a_quantized_activation_is_shared_by_the_layers_that_read_it(ready: Any) -> None:
    layers = {(layer.name, layer.rule): layer for layer in profile({"b": ready}, 2, FakeClock())["b"]}
    kernel = STEPS[1] - STEPS[0]
    for name in ("node_p", "node_q"):
        product = layers[name, "integer_product"]
        assert product.seconds == [kernel + kernel / 2] * 2
        assert product.operations == 2 * ROWS * CHANNELS * 32
        assert product.integer and product.contraction
        # Its codes of 4 bits and a float16 scale for each block of 32.
        assert product.stored == 32 * CHANNELS // 2 + 2 * 32 * CHANNELS // 32
    assert sum(sum(layer.seconds) for layer in layers.values()) == 2 * kernel * len(ready[2]["calls"])


def test_watching_changes_no_number(ready: Any) -> None:
    module, arguments, _ = ready
    before = np.from_dlpack(module.run_raw(arguments)[0]).copy()
    outputs: list[Any] = []
    run = module.run_raw
    try:
        module.run_raw = lambda given: outputs.append(run(given))
        profile({"b": ready}, 1, FakeClock())
    finally:
        del module.run_raw
    for output in (*(made[0] for made in outputs), module.run_raw(arguments)[0]):
        np.testing.assert_array_equal(np.from_dlpack(output), before)


def test_calls_of_a_loop_come_again_and_those_of_several_functions_are_one_row() -> None:
    def call(kernel: str, layer: str, function: int) -> dict[str, Any]:
        return {"kernel": kernel, "layers": [layer], "function": function, "rule": "r", "result": True, "outputs": 1}

    calls = [call("k", "a", 1), call("k", "b", 1), call("m", "a", 0), call("m", "c", 2)]
    found = match([Sample("k", 1.0) for _ in range(4)] + [Sample("m", 1.0)], calls)
    assert [record["layers"] for record in found] == [["a"], ["b"], ["a"], ["b"], ["several layers"]]


def test_of_a_table_only_the_rows_that_are_looked_up_count() -> None:
    sample = Sample("e", 1.0, ((3,), (10, 8), (3, 8)), (24, 80, 96), (False, True, False))
    facts = {"name": "e", "kind": "embedding", "weight_shape": [10, 1, 8], "activation": "float32"}
    assert traffic(sample, facts) == (24, 120)
    assert operations(sample, {"outputs": 1}, facts) == 0


def test_attention_multiplies_each_query_by_each_key_and_each_share_by_each_value() -> None:
    """2 batches of 5 queries, 3 heads, 7 keys, 16 channels, 32 columns."""
    shapes = ((2, 5, 3, 16), (2, 7, 3, 16), (2, 7, 3, 32), (2, 5, 3, 32))
    facts = {"kind": "attention", "keys_axis": 1}
    assert operations(Sample("attention", 1.0, shapes), {"outputs": 1}, facts) == 2 * 2 * 3 * 5 * 7 * (16 + 32)


def test_a_product_of_activations_takes_its_depth_from_its_first_operand() -> None:
    sample = Sample("m", 2.0, ((2, 5, 7), (2, 7, 3), (2, 5, 3)), (280, 168, 120), (False,) * 3)
    call = {"kernel": "m", "layers": ["n"], "function": 0, "rule": "float", "outputs": 1, "result": True}
    facts = {"name": "n", "kind": "batch_matmul", "activation": "float32", "weight_shape": None}
    (layer,) = attribute([sample], {"layers": [facts], "calls": [call]})
    assert (layer.operations, layer.moved, layer.stored) == (2 * 2 * 5 * 3 * 7, 568, 0)


@pytest.mark.parametrize(
    ("seconds", "scheme", "warns"),
    [([3.0, 3.0, 3.0, 3.0], "int4:b32", True), ([3.0, 3.0, 3.0, 3.0], "float32", False),
     ([1.0, 1.9, 3.0, 3.0], "int4:b32", False), ([1.0] * 4, "int4:b32", False)],
)  # fmt: skip
def test_a_quantized_layer_that_is_slower_is_named(seconds: list[float], scheme: str, warns: bool) -> None:
    layer = LayerTimes("n.channels_last", "r", True, seconds)
    base = LayerTimes("n.channels_last", "f", True, [2.0] * 4)
    report = {"layers": [{"name": layer.name, "weight": scheme}]}
    (row,) = layer_rows([layer], [base], None, report)
    assert row["name"] == "n" and row["float_milliseconds"] == 2e3
    assert (row["warning"] is not None) is warns


def test_nothing_is_slower_than_what_the_clock_did_not_see() -> None:
    """On a busy machine a kernel of a microsecond can be given none."""
    layer, base = LayerTimes("n", "r", True, [1e-6] * 4), LayerTimes("n", "f", True, [0.0] * 4)
    (row,) = layer_rows([layer], [base], None, {"layers": [{"name": "n", "weight": "int4:b32"}]})
    assert row["float_milliseconds"] == 0 and row["warning"] is None


def test_the_command_prints_every_layer(model: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", str(bundle), "--layers", "--against", str(model), "--rounds", "2"]
    assert _guarded([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    products = [row for row in found["layers"] if row["operations"]]
    assert [row["name"] for row in products] == ["node_p", "node_q"]
    assert all(row["float_milliseconds"] is not None for row in products)
    assert {row["rule"] for row in found["rules"]} == {row["rule"] for row in found["layers"]}
    assert _guarded(given) == 0
    text = capsys.readouterr().out
    assert "node_p" in text and "limits, probed now" in text


def test_a_bundle_without_records_is_refused(tmp_path: Path) -> None:
    folder = tiny.compile_tiny("reference").write(tmp_path / "old.kbit")
    np.savez(tmp_path / "feeds.npz", **tiny.feeds())
    with pytest.raises(BundleError, match="compile the model again"):
        bench_layers(folder, None, tmp_path / "feeds.npz", (), 1, 1)
