"""Whole builds: deterministic bytes, dumps, facts of the layers, accumulators, cross-compilation, float models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tvm

from kbitc import driver
from kbitc.errors import UnsupportedError
from kbitc.graph.evaluate import evaluate
from kbitc.importer import load_model
from kbitc.importer.feeds import sample_feeds
from kbitc.options import Method, from_arguments
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.targets.build import build
from kbitc.targets.cpu.codegen import LEAST_KERNELS, PARTS, divided
from kbitc.targets.target import parse_target
from tests.conftest import lacking
from tests.support.lowered import model_of, run_of

C, N = 70, 20  # two whole blocks of 32 and a short one; more than one tile of 16


def float_model() -> ir.Model:
    weight = np.random.default_rng(0).standard_normal((C, N)).round(3)
    numbers = ", ".join(str(item) for item in weight.reshape(-1))
    return model_of(
        f"g (float[n, {C}] x) => (float[n, {N}] y) <float[{C}, {N}] w = {{{numbers}}}> {{ y = MatMul(x, w) }}"
    )


def quantized_model(scheme: str, activations: str = "dynamic") -> ir.Model:
    model = float_model()
    target = parse_target("reference")
    options = from_arguments(scheme=scheme, activations=activations, target="reference")
    plan, kinds = driver.make_plan(model, options, target)
    tensors = solve_weights(model, plan, kinds, Method("rtn")).tensors
    return rewrite(model, plan, tensors, kinds)


def test_the_same_input_gives_the_same_bytes() -> None:
    model, target = quantized_model("int4:b32"), parse_target("reference")
    first, second = build(model, target), build(model, target)
    assert first.library == second.library
    assert [(name, array.tobytes()) for name, array in first.weights.items()] == [
        (name, array.tobytes()) for name, array in second.weights.items()
    ]


def test_kernels_compiled_side_by_side_give_the_same_bytes_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * LEAST_KERNELS
    weights = [f"float[{i}, {i + 1}] w{i} = {{{', '.join(['0.5'] * i * (i + 1))}}}" for i in range(1, count + 1)]
    steps = " ".join(f"t{i + 1} = MatMul(t{i}, w{i})" for i in range(1, count + 1))  # each of another shape
    model = model_of(f"g (float[2, 1] t1) => (float[2, {count + 1}] t{count + 1}) <{', '.join(weights)}> {{ {steps} }}")
    target = parse_target("reference")
    libraries = set()
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        built = build(model, target)
        libraries.add(built.library)
    assert len(built.kernels) >= 2 * LEAST_KERNELS, "they would all be in one part"
    assert len(libraries) == 1


@pytest.mark.parametrize("count", [0, 1, LEAST_KERNELS, 2 * LEAST_KERNELS, 10 * PARTS * LEAST_KERNELS + 3])
def test_every_kernel_is_in_one_part(count: int) -> None:
    kernels = [(f"k{i}", i) for i in range(count)]
    parts = divided(kernels)
    assert 1 <= len(parts) <= PARTS
    assert sorted(item for part in parts for item in part.items()) == sorted(kernels)
    assert all(len(part) >= LEAST_KERNELS for part in parts) or len(parts) == 1


def test_the_dump_tells_every_stage() -> None:
    texts: dict[str, str] = {}
    build(quantized_model("int4:b32"), parse_target("reference"), dump=lambda name, text: texts.update({name: text()}))
    assert list(texts) == ["09-relax.py", "10-tir.py", "10-rules.txt", "11-source.s"]
    assert "def main" in texts["09-relax.py"] and "reference" in texts["10-rules.txt"]
    assert ".globl" in texts["11-source.s"]


def test_only_codes_and_scales_are_stored() -> None:
    built = build(quantized_model("int4:b32"), parse_target("reference"))
    stored = {name.rsplit(".", 1)[1]: array for name, array in built.weights.items()}
    assert set(stored) == {"codes", "scales"}
    assert stored["codes"].nbytes == 32 * 96 * 4 // 8  # both dimensions padded: N to 32, C to 96


def test_the_layers_say_which_rule_ran_and_why_others_declined() -> None:
    layer = build(float_model(), parse_target("x86:avx2")).layers[0]
    assert layer["rule"] == "float_product" and layer["weight"] == "float32"
    assert any("not quantized" in item["reason"] for item in layer["declined"])


@pytest.mark.parametrize(
    "scheme", ["int8:c", "int4:b32", "uint4:b32:zp", "uint4:b32:min", "int3:b16", "nf4:b64", "int1:b32", "int5:t"]
)
@pytest.mark.parametrize("activations", ["dynamic", "float"])
def test_a_quantized_product_equals_its_onnx_model(scheme: str, activations: str) -> None:
    """Two float32 sums of C products in another order differ by less than C units in the last place of sum |a b|."""
    model = quantized_model(scheme, activations)
    x = np.random.default_rng(1).standard_normal((3, C)).astype(np.float32)
    expected = evaluate(model, {"x": x})["y"]
    result = run_of(model)({"x": x})[0]
    weight = np.abs(np.asarray(evaluate(model, {"x": np.eye(C, dtype=np.float32)})["y"]))
    bound = C * np.finfo(np.float32).eps * (np.abs(x) @ weight)
    assert np.all(np.abs(result - expected) <= bound + np.finfo(np.float32).tiny)


@pytest.mark.parametrize(("text", "kind"), [
    ("Check failed: (CanProveDivisible(a, b)) is false", UnsupportedError), ("Check failed", tvm.error.InternalError),
])  # fmt: skip
def test_what_tvm_cannot_prove_for_cuda_is_refused(text: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise tvm.error.InternalError(text)

    monkeypatch.setattr(tvm.relax, "build", fail)
    with pytest.raises(kind, match="--shape" if kind is UnsupportedError else text[:12]):
        build(float_model(), parse_target("cuda:sm_90"))


def test_accumulators_are_the_exact_integer_products() -> None:
    model = quantized_model("int4:b32")
    runnable = run_of(model, debug_accumulators=True)
    x = np.random.default_rng(1).standard_normal((3, C)).astype(np.float32)
    names = [info.name.rsplit(".", 1)[-1] for info in runnable.lowered.outputs]
    results = dict(zip(names, runnable({"x": x}), strict=True))
    blocks = [slice(start, min(start + 32, C)) for start in range(0, C, 32)]
    codes = results["codes"].astype(np.int64)[:, :C]
    for index, block in enumerate(blocks):
        part = x[:, block]
        inverse = np.float32(127) / np.abs(part).max(axis=1, keepdims=True)
        assert np.array_equal(codes[:, block], np.rint(part * inverse).astype(np.int64))
        levels = _levels(model)[:, block]
        assert np.array_equal(results["accumulators"][:, index], codes[:, block] @ levels.T)


def _levels(model: ir.Model) -> np.ndarray:
    from kbitc.graph.quantized import read_weight

    node = next(node for node in model.graph if node.op_type == "MatMul")
    weight = read_weight(node.inputs[1], "matmul")
    assert weight is not None
    return weight.levels()[:, 0].astype(np.int64)


def test_aarch64_is_cross_compiled() -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        lacking("no cross compiler for aarch64")
    library = build(quantized_model("int4:b32"), parse_target("arm-neon:dotprod")).library
    assert library[:4] == b"\x7fELF" and int.from_bytes(library[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cls", "rec", "magika", "minilm"])
def test_float_models_equal_onnxruntime(name: str, real_models: dict[str, Path]) -> None:
    """On generated inputs; the tolerance is that of the ONNX backend tests for real models."""
    model = canonicalize(load_model(real_models[name]))
    feeds = sample_feeds(model, None)[0][0]
    expected = evaluate(model, feeds)
    runnable = run_of(model, parse_target("host"))
    for value, result in zip(model.graph.outputs, runnable(feeds), strict=True):
        np.testing.assert_allclose(result, expected[value.name or ""], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_detector_equals_onnxruntime(models_dir: Callable[[str], Path]) -> None:
    path = models_dir("ocr") / "ch_PP-OCRv4_det_infer.onnx"
    model = canonicalize(load_model(path))
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)}
    expected = evaluate(model, feeds)
    runnable = run_of(model, parse_target("host"))
    np.testing.assert_allclose(runnable(feeds)[0], expected[model.graph.outputs[0].name or ""], rtol=1e-3, atol=1e-4)
