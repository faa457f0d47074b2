"""Attention that is put together before emission: when it is, when not, and that the bits stay the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from kbitc.bundle.runtime import load_built
from kbitc.targets.build import build
from kbitc.targets.lower import emitter
from kbitc.targets.lower.attention import fuse_attention
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support.lowered import model_of, run_of

MASK = ", float[B, 1, 1, S] mask"
HEADS = """
    qh = Transpose<perm = [0, 2, 1, 3]>(q)
    kh = Transpose<perm = [0, 2, 3, 1]>(k)
    vh = Transpose<perm = [0, 2, 1, 3]>(v)
"""
SCORES = "scores = MatMul(qh, kh)"
BEHIND = """
    p = Softmax(seen)
    mixed = MatMul(p, vh)
    y = Transpose<perm = [0, 2, 1, 3]>(mixed)
"""
SCALED = "root = Constant<value_float = 5.5>() scaled = Div(scores, root)"
MASKED = "seen = Add(scaled, mask)"


def text(*parts: str, shape: str = "B, S, 3, 20", mask: str = MASK, outputs: str = "float[] y") -> str:
    data = ", ".join(f"float[{shape}] {name}" for name in "qkv")
    return f"g ({data}{mask}) => ({outputs}) {{ {' '.join(parts)} }}"


FORMS = {
    "bert": text(HEADS, SCORES, SCALED, MASKED, BEHIND),
    "mask first, scale by Mul": text(
        HEADS, SCORES, "c = Constant<value_float = 0.3>() scaled = Mul(c, scores) seen = Add(mask, scaled)", BEHIND
    ),
    "no mask": text(HEADS, SCORES, "seen = Identity(scores)", BEHIND, mask=""),
    "keys turned twice": text(
        HEADS.replace("kh =", "k2 =").replace("0, 2, 3, 1", "0, 2, 1, 3"),
        "kh = Transpose<perm = [0, 1, 3, 2]>(k2)", SCORES, SCALED, MASKED, BEHIND,
    ),
    "heads first": text(
        "kh = Transpose<perm = [0, 1, 3, 2]>(k) scores = MatMul(q, kh)", SCALED,
        "seen = Add(scaled, mask) p = Softmax(seen) y = MatMul(p, v)", shape="B, 3, S, 20",
    ),
    "three axes": text(
        "kh = Transpose<perm = [0, 2, 1]>(k) scores = MatMul(q, kh)", SCALED,
        "seen = Add(scaled, mask) p = Softmax(seen) y = MatMul(p, v)", shape="B, S, 24", mask=", float[S, S] mask",
    ),
}  # fmt: skip
#: The form whose sizes are open; the others are compiled for one size, which is faster.
OPEN = "bert"
UNFUSED = {
    "few queries": text(HEADS, SCORES, SCALED, MASKED, BEHIND, shape="B, 4, 3, 20", mask=", float[4] mask"),
    "wide heads": text(HEADS, SCORES, SCALED, MASKED, BEHIND, shape="B, S, 3, 260"),
    "one number for all keys": text(HEADS, SCORES, SCALED, MASKED, BEHIND, mask=", float[B, 1, S, 1] mask"),
    "another axis": text(HEADS, SCORES, SCALED, MASKED, BEHIND.replace("Softmax", "Softmax<axis = 2>")),
    "shares that are read": text(HEADS, SCORES, SCALED, MASKED, BEHIND, outputs="float[] y, float[] p"),
    "scores that are read": text(HEADS, SCORES, SCALED, MASKED, BEHIND, outputs="float[] y, float[] scaled"),
    "keys with channels in front": text(
        HEADS.replace("kh = Transpose<perm = [0, 2, 3, 1]>(k)", ""), "scores = MatMul(qh, turned)", SCALED, MASKED,
        BEHIND, mask=MASK + ", float[B, 3, 20, S] turned",
    ),
    "shares on the right": text(
        HEADS, SCORES, SCALED, MASKED,
        "p = Softmax(seen) w = Transpose<perm = [0, 1, 3, 2]>(vh) y = MatMul(w, p)",
    ),
}  # fmt: skip


def feeds(model: Any, batch: int, rows: int) -> dict[str, Any]:
    """Random numbers; every third key of a mask is left out."""
    random = np.random.default_rng(rows)
    sizes = {"B": batch, "S": rows}
    made = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape.dims]
        made[value.name] = random.normal(size=shape).astype(np.float32)
        if value.name == "mask":
            made["mask"][..., 2::3] = -np.inf
    return made


def here() -> Target:
    target = parse_target("x86:avx2")
    if host_runs(target) is not None:
        pytest.skip("this machine does not run it")
    return target


@pytest.mark.parametrize("name", FORMS)
def test_it_is_put_together_and_the_bits_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = FORMS[name] if name == OPEN else re.sub(r"\bS\b", "13", re.sub(r"\bB\b", "2", FORMS[name]))
    model, target = model_of(written), here()
    counts = Counter(node.op_type for node in fuse_attention(model.clone()).graph)
    assert counts["Attention"] == 1 and not {"MatMul", "Transpose", "Softmax", "Add", "Div", "Mul"} & set(counts)
    fused = run_of(model, target)
    assert [layer["rule"] for layer in fused.lowered.layers] == ["fused_attention"]
    monkeypatch.setattr(emitter, "fuse_attention", lambda model, codes: model)
    apart = run_of(model, target)
    assert [layer["rule"] for layer in apart.lowered.layers] == ["float_batch_product"] * 2
    for batch, rows in ((1, 1), (3, 7), (2, 12), (1, 77), (2, 0), (0, 5)) if name == OPEN else ((2, 13),):
        given = feeds(model, batch, rows)
        np.testing.assert_array_equal(fused(given)[0], apart(given)[0])


@pytest.mark.parametrize("name", UNFUSED)
def test_it_is_left_alone(name: str) -> None:
    model = model_of(UNFUSED[name])
    before = [node.op_type for node in model.graph]
    assert [node.op_type for node in fuse_attention(model).graph] == before


def test_a_target_without_the_rule_gets_the_separate_kernels() -> None:
    rules = {layer["rule"] for layer in run_of(model_of(FORMS["bert"])).lowered.layers}
    assert rules == {"reference"}


def test_one_and_two_threads_agree() -> None:
    model = model_of(FORMS["bert"])
    built = build(model, here())
    given = feeds(model, 2, 300)
    results = []
    for threads in (1, 2):
        loaded = load_built(built.library, built.weights, built.inputs, built.outputs, threads=threads)
        results.append(loaded(given)["y"])
    np.testing.assert_array_equal(results[1], results[0])
