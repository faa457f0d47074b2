"""The quantized graph: what it looks like, that runtimes take it, and that it means what the codes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.graph import ops
from kbitc.graph.evaluate import evaluate
from kbitc.graph.quantized import read_activation, read_weight
from kbitc.graph.text import model_text
from kbitc.options import Method
from kbitc.passes.rewrite.pipeline import LONGEST_SUM, activation_block, rewrite
from kbitc.passes.solve import solve_weights
from kbitc.quant.plan import QuantPlan
from kbitc.quant.scheme import ScaleCode
from kbitc.quant.tensor import QTensor
from kbitc.targets.target import parse_target

SCHEMES = [
    *(f"int{bits}:b32" for bits in range(1, 9)),
    *(f"uint{bits}:b16:zp" for bits in range(1, 9)),
    *(f"uint{bits}:b16:min" for bits in range(1, 9)),
    *("uint4:c:min", "uint8:t:min", "uint3:b32:min:f32", "uint5:c:min:f32"),
    *("nf4:b64", "nf3:c", "int4:c", "int8:t", "uint8:t:zp", "int5:t", "int4:b32:f32", "uint3:c:zp:f32"),
    *("fp2:b32", "fp3-e1m1:c", "fp4-e2m1:b64", "fp5:t", "fp6-e3m2:b16", "fp7:b32:f32", "fp8-e4m3:b64", "fp8-e5m2:c"),
    *("log2-3:b32", "log2-4-r2:b64", "log2-8:c", "dynexp4:b64", "dynexp8:b32", "quantile3:b32", "quantile4:t"),
    *("kmeans2:c", "kmeans4:b64", "kmeans7:b32:f32", "nf4:b16:dq8", "int4:b16:dq8", "int8:c:dq8:f32", "uint3:b16:dq8"),
    *(
        "int4:b16/i4",
        "int3:b32/i4:f32",
        "uint4:b16/i4",
        "fp4:b16/i4",
        "int1:b16/i4",
        "log2-3:b32/i4",
        "uint2:b16/i4:f32",
    ),
]


def _model(body: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text; weights become initializers."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> {body}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for index, node in enumerate(model.graph):
        node.name = f"node{index}"
    return model


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


MATMUL = "g (float[a, 40] x) => (float[a, 7] y) { y = MatMul(x, w) }"
CONV = "g (float[1, 20, 6, 6] x) => (float[1, 9, 4, 4] y) { y = Conv(x, w) }"
DEPTHWISE = "g (float[1, 6, 5, 5] x) => (float[1, 6, 3, 3] y) { y = Conv<group = 6>(x, w) }"
CONV1D = "g (float[2, 33, 9] x) => (float[2, 5, 7] y) { y = Conv(x, w) }"
GATHER = "g (int64[b] i) => (float[b, 24] y) { y = Gather(w, i) }"
CASES = {
    "matmul": (MATMUL, (40, 7)),
    "conv": (CONV, (9, 20, 3, 3)),
    "depthwise": (DEPTHWISE, (6, 1, 3, 3)),
    "conv1d": (CONV1D, (5, 33, 3)),
    "gather": (GATHER, (11, 24)),
}


def _quantize(model: ir.Model, scheme: str, activations: str) -> tuple[ir.Model, QuantPlan, dict[str, QTensor]]:
    chosen = options.from_arguments(scheme=scheme, activations=activations)
    plan, kinds = driver.make_plan(model, chosen, parse_target("reference"))
    tensors = solve_weights(model, plan, kinds, Method("rtn")).tensors
    return rewrite(model, plan, tensors, kinds), plan, tensors


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_value_is_exactly_what_the_codes_stand_for(case: str, scheme: str) -> None:
    body, shape = CASES[case]
    model = _model(body, w=_random(*shape))
    quantized, _, tensors = _quantize(model, scheme, "float")
    onnx.checker.check_model(ir.to_proto(quantized), full_check=True)
    node = next(node for node in quantized.graph if node.op_type in ops.WEIGHT_USES and node.name == "node0")
    use = ops.WEIGHT_USES[node.op_type]
    value = node.inputs[use.weight_input]
    assert value is not None and value.name is not None
    feeds = {item.name: _feed(item) for item in quantized.graph.inputs if item.name}
    found = evaluate(quantized, feeds, [value.name])[value.name]
    expected = ops.from_view(tensors["w"].dequantize(), use.kind, shape)
    np.testing.assert_array_equal(found, expected)


def _feed(value: ir.Value) -> np.ndarray:
    assert value.shape is not None
    shape = [dim if isinstance(dim, int) else 3 for dim in value.shape]
    return np.arange(3) if value.dtype == ir.DataType.INT64 else _random(*shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reader_gives_back_codes_scales_and_scheme(case: str, scheme: str) -> None:
    body, shape = CASES[case]
    quantized, plan, tensors = _quantize(_model(body, w=_random(*shape)), scheme, "float")
    node = next(node for node in quantized.graph if node.name == "node0")
    use = ops.WEIGHT_USES[node.op_type]
    found = read_weight(node.inputs[use.weight_input], use.kind)
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), tensors["w"].dequantize())
    if found.bits == 8 and not tensors["w"].format.uniform:
        assert found.format.uniform  # levels of 8 bits are read as int8
    else:
        np.testing.assert_array_equal(found.codes, tensors["w"].codes)
        assert found.format.levels == tensors["w"].format.levels
    planned = plan.entries[0].scheme
    assert planned is not None
    # Two data types may have the same levels, and doubly quantized scales are often exact in f16 as well.
    same = {"format": found.scheme.format, "variant": found.scheme.variant, "scale_type": found.scheme.scale_type}
    assert found.scheme == replace(planned, **same)
    assert found.format.name == ("table" if tensors["w"].format.learned else found.scheme.format)
    assert found.scheme.scale_type == planned.scale_type or planned.scale_code is ScaleCode.DOUBLE
    assert (found.scale_steps is None) == (tensors["w"].scale_steps is None)
    if planned.scale_code is not ScaleCode.PLAIN:
        np.testing.assert_array_equal(found.scale_codes(), tensors["w"].scale_codes())


@pytest.mark.parametrize("rows", [256, 257, 512])
def test_doubly_quantized_scales_fill_groups_across_rows(rows: int) -> None:
    body = "g (float[a, 20] x) => (float[a, ROWS] y) { y = MatMul(x, w) }".replace("ROWS", str(rows))
    weight = _random(20, rows) * np.linspace(0.01, 9, rows, dtype=np.float32)
    quantized, _, tensors = _quantize(_model(body, w=weight), "int4:b16:dq8", "float")
    onnx.checker.check_model(ir.to_proto(quantized), full_check=True)
    node = next(node for node in quantized.graph if node.name == "node0")
    value = node.inputs[1]
    assert value is not None and value.name is not None
    found = evaluate(quantized, {"x": _random(1, 20)}, [value.name])[value.name]
    np.testing.assert_array_equal(found, tensors["w"].dequantize()[:, 0].T)
    read = read_weight(value, "matmul")
    assert read is not None and read.scale_steps is not None
    assert read.scale_steps.size == -(-2 * rows // 256)
    np.testing.assert_array_equal(read.dequantize(), tensors["w"].dequantize())


def _dynamic_quantize(x: np.ndarray, axis: int, block: int) -> np.ndarray:
    """The definition, written with loops over blocks."""
    moved = np.moveaxis(x, axis, -1)
    result = np.empty_like(moved)
    for start in range(0, moved.shape[-1], block):
        part = moved[..., start : start + block]
        amax = np.maximum(np.abs(part).max(-1, keepdims=True), np.float32(1e-30))
        codes = np.clip(np.rint(part * (np.float32(127) / amax)), -127, 127)
        result[..., start : start + block] = codes * (amax / np.float32(127))
    return np.moveaxis(result, -1, axis)


@pytest.mark.parametrize(("case", "axis"), [("matmul", 1), ("conv", 1), ("conv1d", 1)])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_activations_are_quantized_as_defined(case: str, axis: int, block: int) -> None:
    body, shape = CASES[case]
    quantized, _, tensors = _quantize(_model(body, w=_random(*shape)), f"int4:b{block}", "dynamic")
    onnx.checker.check_model(ir.to_proto(quantized), full_check=True)
    node = next(node for node in quantized.graph if node.name == "node0")
    read = read_activation(node.inputs[0])
    assert read is not None and read[0].name == "x"
    assert (read[1].axis, read[1].block) == (axis, tensors["w"].block)
    feeds = {"x": _feed(quantized.graph.inputs[0])}
    feeds["x"][:, 3] = 0
    feeds["x"][:, 5] = 1e-38
    name = node.inputs[0].name  # type: ignore[union-attr]
    assert name is not None
    found = evaluate(quantized, feeds, [name])[name]
    np.testing.assert_array_equal(found, _dynamic_quantize(feeds["x"], axis, tensors["w"].block))


def test_depthwise_and_embeddings_keep_float_activations() -> None:
    for case in ("depthwise", "gather"):
        body, shape = CASES[case]
        quantized, plan, _ = _quantize(_model(body, w=_random(*shape)), "int4:b32", "dynamic")
        assert plan.entries[0].activation == "float32"
        assert not any(node.op_type == "DynamicQuantize" for node in quantized.graph)


def test_one_activation_quantization_serves_all_its_users() -> None:
    body = "g (float[a, 32] x) => (float[a, 5] y) { p = MatMul(x, w) q = MatMul(x, v) y = Add(p, q) }"
    quantized, _, _ = _quantize(_model(body, w=_random(32, 5), v=_random(32, 5) * 2), "int4:b32", "dynamic")
    assert sum(node.op_type == "DynamicQuantize" for node in quantized.graph) == 1


def test_a_weight_used_twice_is_dequantized_once() -> None:
    body = "g (float[a, 7] x) => (float[a, 7] y) { p = MatMul(x, w) y = MatMul(p, w) }"
    quantized, plan, _ = _quantize(_model(body, w=_random(7, 7)), "int4:b32", "dynamic")
    assert plan.entries[0].nodes == ("node0", "node1")
    assert sum(node.op_type == "DequantizeLinear" for node in quantized.graph) == 1
    assert "w" not in quantized.graph.initializers


def test_a_tied_embedding_and_projection_share_their_codes() -> None:
    body = """g (int64[b] i) => (float[b, 11] y) {
        e = Gather(w, i)  t = Transpose<perm = [1, 0]>(w)  y = MatMul(e, t) }"""
    quantized, plan, tensors = _quantize(_model(body, w=_random(11, 24)), "int3:b16", "dynamic")
    assert len(plan.entries) == 1 and plan.entries[0].activation == "int8"
    matmul = next(node for node in quantized.graph if node.op_type == "MatMul")
    found = read_weight(matmul.inputs[1], "matmul")
    assert found is not None
    np.testing.assert_array_equal(found.codes, tensors["w"].codes)
    evaluate(quantized, {"i": np.array([0, 3])})


def test_the_float_model_is_not_touched() -> None:
    model = _model(MATMUL, w=_random(40, 7))
    before = model_text(model)
    _quantize(model, "int4:b32", "dynamic")
    assert model_text(model) == before


def test_two_bit_integers_raise_the_opset_and_nothing_else_does() -> None:
    versions = {}
    for scheme in ("int2:b32", "int4:b32", "int3:b32"):
        quantized, _, _ = _quantize(_model(MATMUL, w=_random(40, 7)), scheme, "float")
        versions[scheme] = quantized.graph.opset_imports[""]
    assert versions == {"int2:b32": 25, "int4:b32": 21, "int3:b32": 21}


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_odd_widths_take_exactly_their_bits_on_disk(bits: int) -> None:
    quantized, _, _ = _quantize(_model(MATMUL, w=_random(40, 7)), f"int{bits}:b32", "float")
    assert quantized.graph.initializers["w.codes"].const_value.nbytes == -(-40 * 7 * bits // 8)  # type: ignore[union-attr]


def test_activations_beside_integer_block_scales_have_one_scale_a_row() -> None:
    blocks = {}
    for scheme in ("int4:b16", "int4:b16/i4"):
        model, _, _ = _quantize(_model(MATMUL, w=_random(40, 7)), scheme, "dynamic")
        found = read_activation(next(node for node in model.graph if node.op_type == "MatMul").inputs[0])
        assert found is not None
        blocks[scheme] = found[1].block
    assert blocks == {"int4:b16": 16, "int4:b16/i4": 40}


def test_sums_that_int32_may_not_hold_keep_blocks() -> None:
    tensor = _quantize(_model(MATMUL, w=_random(40, 7)), "int4:b16/i4", "dynamic")[2]["w"]
    assert activation_block(tensor) == 40
    wide = replace(tensor, codes=np.zeros((7, 1, LONGEST_SUM + 1), np.uint8))
    assert activation_block(wide) == 16
