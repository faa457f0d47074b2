"""Limits of codes are limits of what is rounded: the same codes, and a model of 7-bit codes is taken as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kbitc
from kbitc.passes.canonicalize.clip_codes import ClipCodes
from tests.support.onnx_text import apply, model, noise, operators, proto

CODES = "g (float[n, 8] x) => (uint8[n, 8] y) { q = QuantizeLinear(x, s, z) y = Clip(q%s) }"
NUMBERS = {
    "s": np.float32(0.037), "z": np.uint8(61), "low": np.uint8(3), "high": np.uint8(127),
    "many": np.full(8, 0.1, np.float32), "zeros": np.zeros(8, np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("limits", [", low, high", ", low", ", , high", ""])
def test_the_codes_are_the_same(limits: str) -> None:
    subject = model(CODES % limits, NUMBERS)
    assert apply(ClipCodes(), subject)
    assert [node.op_type for node in subject.graph] == ["Clip", "QuantizeLinear"]


@pytest.mark.parametrize("zero", [0, 61, 255])
@pytest.mark.parametrize("step", [1e-6, 0.037, 3.3, 1e6])
def test_every_code_is_its_own_limit(step: float, zero: int) -> None:
    """The bound is rounded to float32 and divided by the step again."""
    for limit in range(256):
        steps = np.float32(limit - zero) * np.float32(step)
        assert np.rint(steps / np.float32(step)) == limit - zero


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n, 8] x) => (uint8[n, 8] y, uint8[n, 8] q) { q = QuantizeLinear(x, s, z) y = Clip(q, low, high) }",
        "g (float[n, 8] x) => (uint8[n, 8] y, float[n, 8] d) "
        "{ q = QuantizeLinear(x, s, z) y = Clip(q, low, high) d = DequantizeLinear(q, s, z) }",
        "g (float[n, 8] x) => (uint8[n, 8] y) { q = QuantizeLinear<axis = 1>(x, many, zeros) y = Clip(q, low, high) }",
        "g (float[n, 8] x, uint8 limit) => (uint8[n, 8] y) { q = QuantizeLinear(x, s, z) y = Clip(q, low, limit) }",
        "g (float[n, 8] x, float step) => (uint8[n, 8] y) { q = QuantizeLinear(x, step, z) y = Clip(q, low, high) }",
    ],
    ids=["an output", "read twice", "many scales", "computed limit", "computed scale"],
)
def test_other_limits_stay(text: str) -> None:
    subject = model(text, NUMBERS)
    before = operators(subject)
    assert not apply(ClipCodes(), subject)
    assert operators(subject) == before


def test_a_model_of_7_bit_codes_runs_on_integers(tmp_path: Path) -> None:
    """As torch writes FakeQuantize with codes from 0 to 127."""
    text = """g (float[n, 64] x) => (float[n, 32] y) {
        q = QuantizeLinear(x, s, z) c = Clip(q, none, high) d = DequantizeLinear(c, s, z)
        w = DequantizeLinear(levels, step) m = MatMul(d, w)
        q2 = QuantizeLinear(m, s, z) c2 = Clip(q2, none, high) y = DequantizeLinear(c2, s, z)
    }"""
    levels = np.clip(np.rint(noise(64, 32) * 30), -127, 127).astype(np.int8)
    weights = {**NUMBERS, "none": np.uint8(0), "levels": levels, "step": np.float32(0.002)}
    report = kbitc.compile(proto(text, weights), tmp_path / "model.kbit")
    assert [layer["activation"] for layer in report.layers] == ["uint8"]
