"""The real models, canonicalised: the same numbers in onnxruntime from a far smaller graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.backend.test.loader import load_model_tests

from kbitc.errors import KbitcError
from kbitc.graph.evaluate import evaluate, session_options
from kbitc.graph.legality import after_canonicalize, refuse_unlowerable
from kbitc.graph.text import model_text
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from tests.support.node_cases import rounding
from tests.support.onnx_text import assert_same, operators

# short name -> input shapes, nodes of the canonical graph at most, operators that must be gone.
TOKENS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 12))
MODELS = {
    "cls": ({"x": (2, 3, 48, 192)}, 130, {"BatchNormalization", "Shape", "Clip", "Constant"}),
    "rec": ({"x": (1, 3, 48, 64)}, 215, {"BatchNormalization", "Shape", "Pow", "Sqrt", "Constant"}),
    "magika": ({"bytes": (2, 2048)}, 60, {"Shape", "Expand", "Tanh"}),
    "minilm": (TOKENS, 205, {"Concat", "Constant", "Gemm"}),
}


def feeds_of(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if "input_ids" in shapes:
        ids = rng.integers(0, 30_000, shapes["input_ids"])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    if "bytes" in shapes:
        return {"bytes": rng.integers(0, 257, shapes["bytes"]).astype(np.int32)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fixed", [False, True])
def test_real_model(name: str, fixed: bool, real_models: dict[str, Path]) -> None:
    shapes, limit, gone = MODELS[name]
    feeds = feeds_of(real_models[name], shapes)
    session = ort.InferenceSession(str(real_models[name]), session_options())
    known = {item.name for item in session.get_inputs()}
    feeds = {key: array for key, array in feeds.items() if key in known}
    wanted = dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
    subject = load_model(real_models[name], shapes=shapes if fixed else None)
    canonicalize(subject)
    assert after_canonicalize(subject) == []
    refuse_unlowerable(subject)
    assert sum(operators(subject).values()) <= limit
    assert not gone & set(operators(subject))
    # Folding rounds once per weight; the longest sums have 6 * 384 terms.
    assert_same(wanted, evaluate(subject, feeds), terms=2304)


def test_two_runs_give_the_same_graph(real_models: dict[str, Path]) -> None:
    texts = [model_text(canonicalize(load_model(real_models["magika"]))) for _ in range(2)]
    assert texts[0] == texts[1]


# onnxruntime itself differs from the specification: it adds -inf where the bias mask leaves a finite minimum.
KNOWN = {
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal",
}


def check_node_test(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> bool:
    """One of ONNX's own node tests: canonicalised it gives what onnxruntime gives. False when it does not apply."""
    try:
        session = ort.InferenceSession(model.SerializeToString(), session_options(threads=1))
        wanted = session.run(None, feeds)
    except Exception:
        return False
    try:
        subject = canonicalize(load_model(model))
        refuse_unlowerable(subject)
    except KbitcError:
        return False
    assert after_canonicalize(subject) == []
    least = 2 * rounding(model, list(feeds.values()))
    for expected, found in zip(wanted, evaluate(subject, feeds).values(), strict=True):
        expected, found = np.asarray(expected), np.asarray(found)
        assert expected.shape == found.shape and expected.dtype == found.dtype
        tolerance = 4 * float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else 0
        np.testing.assert_allclose(
            found.astype(np.float64), expected.astype(np.float64), rtol=4 * tolerance, atol=4 * tolerance + least
        )
    return True


@pytest.mark.slow
def test_node_tests_of_onnx() -> None:
    passed, failed = 0, []
    for case in load_model_tests(kind="node"):
        if case.model is None or not case.data_sets or case.name in KNOWN:
            continue
        arrays = case.data_sets[0][0]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            continue
        feeds = {item.name: array for item, array in zip(case.model.graph.input, arrays, strict=False)}
        try:
            passed += check_node_test(case.model, feeds)
        except AssertionError as error:
            failed.append(f"{case.name}: {str(error)[:200]}")
    assert not failed, failed
    assert passed > 800
