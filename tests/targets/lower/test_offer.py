"""Products of nothing: no rows are computed by plain loops, no terms are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kbitc
from kbitc.errors import UnsupportedError
from tests.support.onnx_text import noise, proto


@pytest.mark.parametrize("scheme", ["float32", "int8:c", "int4:b32"])
def test_a_product_of_no_rows(scheme: str, tmp_path: Path) -> None:
    message = proto("g (float[0, 8] x) => (float[0, 5] y) { y = MatMul(x, w) }", {"w": noise(8, 5)})
    report = kbitc.compile(message, tmp_path / "model.kbit", scheme=scheme, activations="float")
    assert [layer["rule"] for layer in report.layers] == ["reference"]
    assert kbitc.load(tmp_path / "model.kbit")({"x": np.zeros((0, 8), np.float32)})["y"].shape == (0, 5)


@pytest.mark.parametrize(("given", "made"), [("0, 8", "0, 5"), ("2, 0, 8", "2, 0, 5"), ("0, 3, 8", "0, 3, 5")])
def test_a_product_of_no_rows_with_codes(given: str, made: str, tmp_path: Path) -> None:
    message = proto(f"g (float[{given}] x) => (float[{made}] y) {{ y = MatMul(x, w) }}", {"w": noise(8, 5)})
    kbitc.compile(message, tmp_path / "model.kbit", scheme="int4:b32", activations="dynamic")
    shape = [int(dim) for dim in given.split(", ")]
    assert kbitc.load(tmp_path / "model.kbit")({"x": np.zeros(shape, np.float32)})["y"].shape == (*shape[:-1], 5)


@pytest.mark.parametrize("scheme", ["float32", "int8:c"])
def test_a_product_of_no_terms(scheme: str, tmp_path: Path) -> None:
    message = proto("g (float[3, 0] x) => (float[3, 5] y) { y = MatMul(x, w) }", {"w": noise(0, 5)})
    with pytest.raises(UnsupportedError, match="no products.*MatMul"):
        kbitc.compile(message, tmp_path / "model.kbit", scheme=scheme, activations="float")


def test_a_weight_that_is_an_output_stays_float(tmp_path: Path) -> None:
    weights = {"table": noise(9, 8), "v": noise(8, 5)}
    text = "g (int64[n] i) => (float[n, 5] y, float[9, 8] table) { h = Gather(table, i) y = MatMul(h, v) }"
    report = kbitc.compile(proto(text, weights), tmp_path / "model.kbit", scheme="int8:c")
    assert [item.entry.tensor for item in report.weights] == ["v"]
    found = kbitc.load(tmp_path / "model.kbit")({"i": np.array([3, 0])})
    np.testing.assert_array_equal(found["table"], weights["table"])
