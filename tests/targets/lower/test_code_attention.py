"""Attention of codes that is put together before emission: when it is, when not, and that the integers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.graph.integer_functions import code_factor
from kbitc.targets.build import build
from kbitc.targets.lower import emitter
from kbitc.targets.lower.attention import fuse_attention
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support.integer_graphs import Graph, feed
from tests.support.lowered import run_of
from tests.support.qemu import need_runner, run_on

TARGETS = ("x86:avx512vnni", "x86:avx2")
NEON = "arm-neon:dotprod"
Dim = int | str


def attention(
    batch: Dim = "B",
    length: Dim = "S",
    channels: int = 16,
    *,
    zeros: tuple[int, int, int, int] = (120, 131, 7, 90),
    scale: tuple[str, float] | None = ("Div", 5.5),
    masked: bool = True,
    levels: tuple[int, int] = (0, 255),
    tail: str = "Requantize",
    read: bool = False,
    heads: int = 3,
) -> ir.Model:
    """softmax(q k^T * scale + mask) v of codes; q, k and v are tables of the codes of x [B, S, heads, C]."""
    g = Graph()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((batch, length, heads, channels)))
    codes = g.node("QuantizeLinear", x, np.array(1 / 32, np.float32), np.array(128, np.uint8))
    q, k, v = (g.node("Table", codes, g.random.permutation(256).astype(np.uint8)) for _ in range(3))
    q, k, v = (
        g.node("Transpose", item, perm=perm) for item, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
    )
    q_zero, k_zero, share_zero, v_zero = (np.array(zero, np.uint8) for zero in zeros)
    scores = g.node("MatMulInteger", q, k, q_zero, k_zero)
    seen = g.node("DequantizeLinear", scores, np.array(7e-6, np.float32))
    if scale is not None:
        seen = g.node(scale[0], seen, np.array(scale[1], np.float32))
    if masked:
        mean = g.node("ReduceMean", x, np.array([2, 3]), keepdims=0)
        seen = g.node("Add", seen, g.node("Unsqueeze", g.node("Mul", mean, np.array(9, np.float32)), np.array([1, 2])))
    shares = g.node("Softmax", seen)
    shares = g.node("QuantizeLinear", shares, np.array(1 / 231, np.float32), share_zero)
    mixed = g.node("MatMulInteger", shares, v, share_zero, v_zero)
    if tail == "Requantize":
        multiplier, shift = (np.array([part], np.int32) for part in code_factor(1 / 300))
        mixed = g.node("Requantize", mixed, multiplier, shift, 100, axis=0, low=levels[0], high=levels[1])
    y = g.node("Transpose", mixed, perm=(0, 2, 1, 3))
    return g.finish(x, [y, shares] if read else [y])


FORMS: dict[str, dict[str, Any]] = {
    "bert": {},
    "middle zeros, by Mul": {"zeros": (0, 128, 0, 128), "scale": ("Mul", 0.3), "channels": 64},
    "nothing scales": {"scale": None, "zeros": (255, 0, 0, 255), "channels": 32, "levels": (20, 200)},
    "neither scale nor mask": {"scale": None, "masked": False, "channels": 48},
}  # fmt: skip
#: The form whose sizes are open; the others are compiled for one size, which is faster.
OPEN = "bert"
UNFUSED: dict[str, dict[str, Any]] = {
    "uneven channels": {"channels": 24},
    "few queries": {"length": 4},
    "sums that leave": {"tail": ""},
    "shares that are read": {"read": True},
}


def here(name: str) -> Target:
    target = parse_target(name)
    if host_runs(target) is not None:
        pytest.skip("this machine does not run it")
    return target


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("name", FORMS)
def test_it_is_put_together_and_the_integers_stay(name: str, target_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_sizes = name == OPEN
    model, target = attention(*(() if open_sizes else (2, 13)), **FORMS[name]), here(target_name)
    counts = Counter(node.op_type for node in fuse_attention(model.clone()).graph)
    assert counts["Attention"] == 1 and not {"MatMulInteger", "Transpose", "Softmax", "Requantize"} & set(counts)
    fused = run_of(model, target)
    assert [layer["rule"] for layer in fused.lowered.layers] == ["code_attention"]
    monkeypatch.setattr(emitter, "fuse_attention", lambda model, codes: model)
    apart = run_of(model, target)
    assert [layer["rule"] for layer in apart.lowered.layers] == ["code_batch_product"] * 2
    sizes = ((1, 1), (2, 5), (3, 8), (1, 15), (2, 16), (1, 50), (1, 77), (2, 0), (0, 5)) if open_sizes else ((2, 13),)
    for batch, length in sizes:
        x = feed((batch, length, 3, FORMS[name].get("channels", 16)), length)
        np.testing.assert_array_equal(fused({"x": x})[0], apart({"x": x})[0])


@pytest.mark.parametrize("name", UNFUSED)
def test_it_is_left_alone(name: str) -> None:
    model = attention(**UNFUSED[name])
    before = [node.op_type for node in model.graph]
    assert [node.op_type for node in fuse_attention(model).graph] == before


def test_integers_that_are_shown_are_made_apart() -> None:
    shown = run_of(attention(2, 9), here(TARGETS[0]), debug_accumulators=True)
    assert [layer["rule"] for layer in shown.lowered.layers] == ["code_batch_product"] * 2
    plain = run_of(attention(2, 9), here(TARGETS[0]))
    x = feed((2, 9, 3, 16))
    np.testing.assert_array_equal(shown({"x": x})[0], plain({"x": x})[0])


def test_a_target_without_the_rule_gets_the_separate_kernels() -> None:
    assert {layer["rule"] for layer in run_of(attention(2, 9)).lowered.layers} == {"reference"}


@pytest.mark.slow
def test_neon_gives_the_integers_of_x86() -> None:
    """Partial vectors of keys and rows of every register tile; zero points that leave row sums."""
    target = need_runner(NEON)
    for length, options in ((13, {}), (70, {"zeros": (3, 128, 9, 1), "channels": 32})):
        model = attention(2, length, **options)
        x = feed((2, length, 3, options.get("channels", 16)))
        wanted = run_of(model, here(TARGETS[0]))({"x": x})[0]
        built = build(model, target)
        outcome = run_on(target, built.library, built.weights, built.inputs, built.outputs, {"x": x})
        np.testing.assert_array_equal(outcome.outputs[built.outputs[0].name], wanted)
