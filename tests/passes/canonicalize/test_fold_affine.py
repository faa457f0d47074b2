"""BatchNormalization and other constants behind a convolution go into its weight."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import ModelError
from kbitc.graph.edit import constant
from kbitc.passes.base import run_until_stable
from kbitc.passes.canonicalize.fold_affine import FoldAffine
from kbitc.passes.canonicalize.fold_batch_norm import DecomposeBatchNorm
from kbitc.passes.canonicalize.gemm_to_matmul import GemmToMatMul
from tests.support.onnx_text import apply, model, noise, operators

CONV = "g (float[1, 4, 5, 5] x) => (float[] y) { c = Conv%s(x, w%s) \n %s }"


def batch_norm(channels: int) -> dict[str, np.ndarray]:
    return {
        "gamma": noise(channels, seed=1),
        "beta": noise(channels, seed=2),
        "mean": noise(channels, seed=3),
        "var": np.abs(noise(channels, seed=4)) + 0.1,
    }


@pytest.mark.parametrize(
    ("attributes", "weight", "channels"),
    [
        ("", (6, 4, 3, 3), 6),
        ("<group = 2>", (6, 2, 3, 3), 6),
        ("<group = 4>", (4, 1, 3, 3), 4),
        ("<pads = [1, 1, 1, 1]>", (6, 4, 3, 3), 6),
    ],
)
@pytest.mark.parametrize("bias", ["", ", b"])
def test_batch_norm_disappears_into_conv(attributes: str, weight: tuple[int, ...], channels: int, bias: str) -> None:
    tail = "y = BatchNormalization(c, gamma, beta, mean, var)"
    weights = {"w": noise(*weight), **batch_norm(channels)}
    if bias:
        weights["b"] = noise(channels)
    subject = model(CONV % (attributes, bias, tail), weights)
    assert apply(DecomposeBatchNorm(), subject, terms=2)
    assert operators(subject) == {"Add": 1, "Conv": 1, "Mul": 1}
    assert apply(FoldAffine(), subject, terms=64)
    assert operators(subject) == {"Conv": 1}


@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose_scales_its_output_channels(group: int) -> None:
    """The weight is [inputs, outputs / group, ...]: the factor of a group's output lies on axis 1."""
    graph = f"g (float[1, 4, 3, 3] x) => (float[] y) {{ c = ConvTranspose<group = {group}>(x, w) \n y = Mul(c, s) }}"
    weights = {"w": noise(4, 6 // group, 2, 2), "s": noise(6, 1, 1)}
    subject = model(graph, weights)
    assert apply(FoldAffine(), subject, terms=32)
    assert operators(subject) == {"ConvTranspose": 1}


@pytest.mark.parametrize("tail", ["y = Div(c, s)", "y = Sub(c, s)", "m = Mul(s, c) \n y = Add(m, t)"])
def test_chains_of_constants(tail: str) -> None:
    weights = {"w": noise(6, 4, 3, 3), "s": noise(6, 1, 1) + 3, "t": np.float32(0.5)}
    subject = model(CONV % ("", "", tail), weights)
    assert apply(FoldAffine(), subject, terms=64)
    assert operators(subject) == {"Conv": 1}


@pytest.mark.parametrize(
    ("tail", "extra"),
    [
        ("y = Mul(c, s)", {"s": noise(3, 3)}),  # varies over pixels
        ("y = Mul(c, s)", {"s": noise(3)}),  # varies along the last axis
        ("y = Mul(c, s)", {"s": noise(2, 1, 1, 1)}),  # widens the batch
        ("y = Div(s, c)", {"s": np.float32(2.0)}),  # the convolution is the divisor
        ("y = Mul(c, s) \n z = Relu(c)", {"s": np.float32(2.0)}),  # the result has another reader
        ("y = Mul(c, c)", {}),
    ],
)
def test_keeps_the_graph(tail: str, extra: dict[str, np.ndarray]) -> None:
    outputs = "(float[] y, float[] z)" if "z =" in tail else "(float[] y)"
    graph = (CONV % ("", "", tail)).replace("(float[] y)", outputs)
    subject = model(graph, {"w": noise(6, 4, 3, 3), **extra})
    assert not apply(FoldAffine(), subject)


def test_keeps_a_convolution_that_is_an_output() -> None:
    graph = (CONV % ("", "", "y = Mul(c, s)")).replace("(float[] y)", "(float[] y, float[] c)")
    assert not apply(FoldAffine(), model(graph, {"w": noise(6, 4, 3, 3), "s": np.float32(2)}))


def test_a_shared_weight_is_copied_not_changed() -> None:
    graph = """g (float[1, 4, 5, 5] x) => (float[] y, float[] z) {
        c = Conv(x, w)
        y = Mul(c, s)
        z = Conv<strides = [2, 2]>(x, w)
    }"""
    subject = model(graph, {"w": noise(6, 4, 3, 3), "s": np.float32(2)})
    assert apply(FoldAffine(), subject, terms=64)
    assert operators(subject) == {"Conv": 2}
    np.testing.assert_array_equal(constant(subject.graph.initializers["w"]), noise(6, 4, 3, 3))


def test_batch_norm_without_conv_becomes_mul_and_add() -> None:
    graph = "g (float[2, 3] x) => (float[] y) { y = BatchNormalization(x, gamma, beta, mean, var) }"
    subject = model(graph, batch_norm(3))
    assert apply(DecomposeBatchNorm(), subject, terms=4)
    assert operators(subject) == {"Add": 1, "Mul": 1}


def test_computed_parameters_keep_batch_norm() -> None:
    graph = "g (float[2, 3] x, float[3] v) => (float[] y) { y = BatchNormalization(x, gamma, beta, mean, v) }"
    weights = batch_norm(3)
    del weights["var"]
    subject = model(graph, weights)
    assert not DecomposeBatchNorm()(subject).modified


def test_negative_variance_is_refused() -> None:
    graph = "g (float[2, 3] x) => (float[] y) { y = BatchNormalization(x, gamma, beta, mean, var) }"
    with pytest.raises(ModelError, match="variance is negative"):
        model(graph, {**batch_norm(3), "var": np.array([1, -1, 1], np.float32)})


@pytest.mark.parametrize(
    "attributes",
    ["", "<transB = 1>", "<transA = 1>", "<alpha = 0.5, beta = 2.0>", "<beta = 0.0>", "<transA = 1, transB = 1>"],
)
@pytest.mark.parametrize("addend", ["", ", c"])
def test_gemm_becomes_matmul(attributes: str, addend: str) -> None:
    shape = "5, 2" if "transA" in attributes else "2, 5"
    graph = f"g (float[{shape}] x) => (float[] y) {{ y = Gemm{attributes}(x, w{addend}) }}"
    weights = {"w": noise(4, 5) if "transB" in attributes else noise(5, 4)}
    if addend:
        weights["c"] = noise(4)
    subject = model(graph, weights)
    assert apply(GemmToMatMul(), subject, terms=8)
    assert "Gemm" not in operators(subject) and operators(subject)["MatMul"] == 1


def test_tied_gemm_weight_stays_one_weight() -> None:
    """Gather reads the table as it is, Gemm reads it transposed: folding the Transpose would make two weights."""
    from kbitc.passes.canonicalize import canonicalize

    graph = """g (int64[2] ids, float[2, 64] h) => (float[] y, float[] z) {
        z = Gather(table, ids)
        y = Gemm<transB = 1>(h, table)
    }"""
    subject = canonicalize(model(graph, {"table": noise(96, 64)}))
    assert list(subject.graph.initializers) == ["table"]
    assert operators(subject) == {"Gather": 1, "MatMul": 1, "Transpose": 1}


def test_folding_comes_to_rest() -> None:
    graph = CONV % ("", "", "y = BatchNormalization(c, gamma, beta, mean, var)")
    subject = model(graph, {"w": noise(6, 4, 3, 3), **batch_norm(6)})
    assert run_until_stable(subject, (DecomposeBatchNorm(), FoldAffine())).modified
