"""Static integer graphs, compiled: the module gives the very numbers of the integer ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kbitc
from kbitc.errors import UnsupportedError, UsageError
from tests.passes.rewrite.test_integer_only import ENCODER, NORMS, WEIGHTS, encoder_feeds
from tests.passes.rewrite.test_quantize_static import between, own_cache
from tests.support.onnx_text import noise, proto

__all__ = ["own_cache"]


def test_a_network_of_integers_is_equal(tmp_path: Path) -> None:
    graph, weights = between("d = Conv<pads = [1, 1, 1, 1]>(x, u) e = Add(c, d) s = Sigmoid(e) r = Mul(e, s)")
    feeds = [{"x": noise(2, 3, 12, 10, seed=seed)} for seed in range(3)]
    report = kbitc.compile(proto(graph, weights), tmp_path / "m.kbit", bits=8, activations="static", calibration=feeds)
    assert report.accuracy["exact"]
    assert report.accuracy["lowering"]["y"]["max_error"] == 0
    assert all(item.entry.activation == "uint8" for item in report.weights)
    found = kbitc.load(tmp_path / "m.kbit")(feeds[0])
    assert found["y"].dtype == np.float32


def test_blocks_that_the_plan_chooses_are_equal(tmp_path: Path) -> None:
    """A short and a long row: one scale a channel and integer block scales in one graph."""
    weights = {"u": noise(24, 12), "w": (noise(160, 24) * np.exp(noise(5, 24)).repeat(32, 0)).astype(np.float32)}
    graph = "g (float[N, 160] x) => (float[N, 12] y) { m = MatMul(x, w) r = Relu(m) y = MatMul(r, u) }"
    feeds = [{"x": noise(6, 160, seed=seed)} for seed in range(2)]
    report = kbitc.compile(proto(graph, weights), tmp_path / "m.kbit", bits=4, activations="static", calibration=feeds)
    assert {item.entry.tensor: str(item.entry.scheme) for item in report.weights} == {"w": "int4:b32/i4", "u": "int4:c"}
    assert report.accuracy["exact"] and report.accuracy["lowering"]["y"]["max_error"] == 0


def test_an_encoder_of_integers_is_equal(tmp_path: Path) -> None:
    weights = {"table": noise(20, 16), "where": noise(1, 6, 16) / 4, **NORMS}
    weights |= {name if name in "abc" else f"{name}0": array for name, array in WEIGHTS.items()}
    report = kbitc.compile(
        proto(ENCODER, weights), tmp_path / "m.kbit", bits=8, integer_only=True, calibration=encoder_feeds()
    )
    assert report.accuracy["exact"] and report.accuracy["lowering"]["y"]["max_error"] == 0


def test_refusals(tmp_path: Path) -> None:
    graph = proto("g (float[2, 8] x) => (float[2, 8] y) { m = MatMul(x, w) y = Sin(m) }", {"w": noise(8, 8)})
    feeds = [{"x": noise(2, 8)}]
    with pytest.raises(UnsupportedError, match="Sin has no integer form"):
        kbitc.compile(graph, tmp_path / "m.kbit", integer_only=True, calibration=feeds)
    with pytest.raises(UsageError, match="--calibration"):
        kbitc.compile(graph, tmp_path / "m.kbit", activations="static")
    assert not (tmp_path / "m.kbit").exists()
