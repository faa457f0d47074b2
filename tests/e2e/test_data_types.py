"""Every data type, compiled for this machine: the module computes what its quantized ONNX means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import kbitc
from kbitc.passes.verify.accuracy import LOWERING_CEILING_DB
from kbitc.quant.metrics import compare

QUICK = ("fp4-e2m1:b32", "kmeans4:b64", "int4:b32/i4", "int8:c:dq8", "uint4:b32:min")
SLOW = (
    *("fp2:b32", "fp3:c", "fp5-e3m1:b32", "fp6:b64", "fp8-e4m3:b32", "fp8-e5m2:c", "log2-2:b32", "log2-4:b32"),
    *("log2-5:b64", "log2-8:b32", "dynexp3:b32", "dynexp4:t", "dynexp8:b32", "quantile3:b32", "quantile4:c"),
    *("kmeans2:b32", "kmeans3:t", "uint4:b32/i4", "fp4:b32/i4", "int3:b16/i4:f32", "nf4:b16:dq8", "uint3:b32:dq8"),
    *("uint1:b16:min", "uint3:c:min", "uint8:b48:min:f32"),
)
SCHEMES = [*QUICK, *(pytest.param(text, marks=pytest.mark.slow) for text in SLOW)]
MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[b] i, float[1, 33, 6, 6] p) => (float[b, 20] y, float[1, 18, 4, 4] q) {
    e = Gather(table, i)
    y = MatMul(e, w)
    q = Conv(p, k)
}"""
SHAPES = {"table": (30, 96), "w": (96, 20), "k": (18, 33, 3, 3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding, a matrix product and a convolution with normal weights."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MODEL)
    for name, shape in SHAPES.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize(
    ("options", "scheme", "others"),
    [({"centre": True}, "int4:b32", {None}), ({"proxy": 10}, "int4:b32", {"int8:c"}),
     ({"centre": True, "proxy": 5}, "nf4:b16", {None, "int8:c"})],
)  # fmt: skip
def test_split_products_compile(
    options: dict[str, float], scheme: str, others: set[str | None], layers: Path, tmp_path: Path
) -> None:
    quantized, bundle = tmp_path / "quantized.onnx", tmp_path / "bundle.kbit"
    kbitc.quantize(layers, quantized, scheme=scheme, activations="float", **options)
    report = kbitc.compile(layers, bundle, scheme=scheme, activations="float", **options)
    schemes = [None if item.entry.scheme is None else str(item.entry.scheme) for item in report.weights]
    assert set(schemes) == {scheme, *others} and schemes.count(scheme) == 2
    feeds = {"x": np.random.default_rng(1).normal(size=(5, 90)).astype(np.float32)}
    floats, expected, got = _run(layers, feeds), _run(quantized, feeds), kbitc.load(bundle)(feeds)
    # Round to nearest at 4 bits (tests/passes/solvers/test_rtn.py), and two layers of equal noise.
    assert compare([floats], [expected])["y"].sqnr_db > 6.02 * 4 + 4.77 - 20 * np.log10(4.2) - 3.01
    assert compare([expected], [got])["y"].sqnr_db >= LOWERING_CEILING_DB


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products with an activation between them."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[b, 90] x) => (float[b, 20] y) { h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("v", (90, 70)), ("w", (70, 20))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    path = tmp_path_factory.mktemp("layers") / "model.onnx"
    onnx.save(proto, path)
    return path


def _run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


@pytest.mark.parametrize("activations", ["float", "dynamic"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_module_agrees_with_its_quantized_onnx(scheme: str, activations: str, model: Path, tmp_path: Path) -> None:
    quantized, bundle = tmp_path / "quantized.onnx", tmp_path / "bundle.kbit"
    kbitc.quantize(model, quantized, scheme=scheme, activations=activations)
    report = kbitc.compile(model, bundle, scheme=scheme, activations=activations)
    assert len(report.weights) == len(SHAPES) and all(item.entry.scheme is not None for item in report.weights)
    onnx.checker.check_model(str(quantized), full_check=True)
    rng = np.random.default_rng(1)
    feeds = {"i": np.array([0, 29, 7, -1]), "p": rng.normal(size=(1, 33, 6, 6)).astype(np.float32)}
    # With one product behind the input both round the same activations: only the order of sums may differ.
    for name, found in compare([_run(quantized, feeds)], [kbitc.load(bundle)(feeds)]).items():
        assert found.sqnr_db >= LOWERING_CEILING_DB, name
