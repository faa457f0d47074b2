"""onnxruntime's own operators, rewritten as standard ones, give what onnxruntime gives for the originals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.errors import ModelError
from kbitc.graph.evaluate import evaluate
from kbitc.graph.legality import refuse_unlowerable
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.canonicalize import canonicalize
from tests.support.onnx_text import assert_same, noise, operators, proto

HEADER = "g (float[2, 4, 8] x) => (float[2, 4, 8] y) { %s }"
WEIGHTS = {
    "skip": noise(2, 4, 8), "gamma": noise(8, seed=1), "beta": noise(8, seed=2), "bias": noise(8, seed=3),
    "m": noise(8, 8, seed=4),
}  # fmt: skip
CASES = {
    "gelu": "y = com.microsoft.Gelu(x)",
    "bias gelu": "y = com.microsoft.BiasGelu(x, bias)",
    "fast gelu": "y = com.microsoft.FastGelu(x)",
    "fast gelu bias": "y = com.microsoft.FastGelu(x, bias)",
    "quick gelu": "y = com.microsoft.QuickGelu<alpha = 1.5>(x)",
    "skip layer norm": "y = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, skip, gamma, beta)",
    "skip layer norm bias": "y = com.microsoft.SkipLayerNormalization(x, skip, gamma, beta, bias)",
    "skip layer norm sum": """n, a, b, s = com.microsoft.SkipLayerNormalization(x, skip, gamma, beta)
        y = Add(n, s)""",
    "skip rms norm": "y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, skip, gamma)",
    "rms norm without domain": "y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, gamma)",
    "fused matmul": "y = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, m)",
}


def both(message: object, terms: int) -> ir.Model:
    """The canonical model, once it was shown to compute the same as the original."""
    subject = load_model(message)  # type: ignore[arg-type]
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    canonicalize(subject)
    refuse_unlowerable(subject)
    assert_same(before, evaluate(subject, feeds), terms)
    assert not any(node.domain for node in subject.graph)
    return subject


@pytest.mark.parametrize("name", CASES)
def test_translated(name: str) -> None:
    nodes = CASES[name]
    used = {key: array for key, array in WEIGHTS.items() if f"{key}," in nodes or f"{key})" in nodes}
    if name == "fast gelu bias":
        used["bias"] = WEIGHTS["bias"]
    both(proto(HEADER % nodes, used, opset=17, domains=', "com.microsoft" : 1'), terms=64)


def matmul_nbits(bits: int, block: int, width: int, rows: int, zeros: bool, bias: bool) -> object:
    """A MatMulNBits with random codes; padding codes at the end of each row are random too, and must not matter."""
    rng = np.random.default_rng([bits, block, width, rows])
    blocks = -(-width // block)
    weights = {
        "B": rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        "S": rng.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32),
    }
    inputs = "x, B, S"
    if zeros:
        weights["Z"] = rng.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
        inputs += ", Z"
    if bias:
        weights["b"] = noise(rows)
        inputs += ("" if zeros else ", ") + ", , b"
    node = f"com.microsoft.MatMulNBits<K = {width}, N = {rows}, bits = {bits}, block_size = {block}>({inputs})"
    graph = f"g (float[3, {width}] x) => (float[3, {rows}] y) {{ y = {node} }}"
    return proto(graph, weights, opset=21, domains=', "com.microsoft" : 1')


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "rows", "block"), [(64, 8, 32), (48, 5, 16), (72, 3, 32)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_nbits_keeps_its_bits(bits: int, width: int, rows: int, block: int, zeros: bool, bias: bool) -> None:
    """Codes of up to 255, scales of up to 0.1: the sum of 72 products is bounded by its size in `terms`."""
    subject = both(matmul_nbits(bits, block, width, rows, zeros, bias), terms=72 * 26)
    counts = operators(subject)
    assert counts["DequantizeLinear"] == 1 and counts["MatMul"] == 1
    codes = next(node for node in subject.graph if node.op_type == "DequantizeLinear").inputs[0]
    assert codes.dtype == (ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8)
    assert list(codes.shape.dims) == [rows, width]


def test_matmul_nbits_of_2_bits_becomes_float() -> None:
    """Opset 21 has no 2-bit type."""
    subject = both(matmul_nbits(2, 32, 64, 8, False, False), terms=72)
    assert operators(subject) == {"MatMul": 1}


def test_matmul_nbits_that_does_not_add_up() -> None:
    message = matmul_nbits(4, 32, 64, 8, False, False)
    message.graph.node[0].attribute[0].i = 128  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="MatMulNBits"):
        canonicalize(load_model(message))  # type: ignore[arg-type]


def test_unknown_contrib_operators_are_left_for_legality() -> None:
    message = proto(
        HEADER % "y = com.microsoft.FusedMatMul<transBatchA = 1>(x, m)",
        {"m": WEIGHTS["m"]},
        opset=17,
        domains=', "com.microsoft" : 1',
    )
    subject = canonicalize(load_model(message))
    assert operators(subject) == {"com.microsoft::FusedMatMul": 1}
