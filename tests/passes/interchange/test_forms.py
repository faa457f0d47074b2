"""Every form of a quantized model against the quantized ONNX model: the same numbers, the same weights."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from kbitc import catalog, driver, options
from kbitc.errors import UnsupportedError, UsageError
from kbitc.graph.evaluate import Session
from kbitc.options import Method
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.interchange import compressed_tensors, matmulnbits, qdq
from kbitc.passes.interchange._export import Export, widened
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.passes.solvers import rtn
from kbitc.quant.scheme import QuantScheme
from kbitc.targets.target import parse_target
from tests.support import planned
from tests.support.onnx_text import noise, proto

# Of two float32 sums of the same 40 products in different order: 40 eps relative to the sum of their magnitudes.
SUM_ORDER = 40 * np.finfo(np.float32).eps
# -offset / scale and code minus it are rounded; offsets are at most 4 times the mean size of these normal weights.
ZERO_ROUNDING = 8 * np.finfo(np.float32).eps


def _export(form: str, **chosen: Any) -> Export:
    model = planned.model()
    made = options.from_arguments(form=form, **chosen)
    plan, kinds = driver.make_plan(model, made, parse_target("reference"))
    tensors = solve_weights(model, plan, kinds, Method("rtn")).tensors
    return Export(model, rewrite(model, plan, tensors, kinds), plan, tensors, kinds)


def _outputs(model: ir.Model) -> list[dict[str, Any]]:
    session = Session(model)
    return [session.run(feed) for feed in planned.feeds()]


def _assert_equal(export: Export, model: ir.Model, tolerance: float = 0.0) -> None:
    for expected, found in zip(_outputs(export.quantized), _outputs(model), strict=True):
        for name, array in expected.items():
            largest = tolerance * float(np.abs(array).max()) * 10  # magnitudes sum to less than ten times the result
            np.testing.assert_allclose(found[name], array, rtol=0, atol=largest)


def test_every_form_is_found_by_its_file() -> None:
    assert catalog.names(driver.FORMS) == ["compressed_tensors", "matmulnbits", "onnx", "qdq"]


@pytest.mark.parametrize(("family", "bits"), [*product(("int", "uint"), range(1, 9)), *product(("nf",), range(2, 8))])
def test_widened_codes_are_the_same_weights(family: str, bits: int) -> None:
    weight = np.random.default_rng(bits).normal(size=(5, 3, 40)).astype(np.float32)
    tensor = rtn.solve(weight, QuantScheme.parse(f"{family}{bits}:b16"))
    wide = widened(tensor)
    assert wide.bits in (2, 4, 8) and wide.bits == (8 if family == "nf" and bits > 2 else wide.bits)
    assert wide.bits >= bits
    np.testing.assert_array_equal(wide.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("scheme", "becomes"),
    [
        ("fp4-e2m1:b16", "int8:b16"),
        ("fp2:c", "int2:c"),
        ("log2-4:b16", "int8:b16"),
        ("kmeans3:t", "int8:t"),
        ("int4:b16/i4", "int4:b16"),
        ("uint3:b16/i4:f32", "uint4:b16:zp:f32"),
        ("nf4:b16:dq8", "int8:b16"),
    ],
)
def test_tables_and_coded_scales_become_plain_integers(scheme: str, becomes: str) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 3, 40)).astype(np.float32)
    tensor = rtn.solve(weight, QuantScheme.parse(scheme))
    wide = widened(tensor)
    assert str(wide.scheme) == becomes
    np.testing.assert_array_equal(wide.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("bits", range(1, 9))
def test_widened_codes_beside_offsets_are_the_same_weights(bits: int) -> None:
    weight = np.random.default_rng(bits).normal(size=(5, 3, 40)).astype(np.float32)
    tensor = rtn.solve(weight, QuantScheme.parse(f"uint{bits}:b16:min"))
    wide = widened(tensor)
    assert wide.bits in (2, 4, 8) and wide.bits >= bits
    np.testing.assert_array_equal(wide.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("form", ["qdq", "compressed_tensors"])
def test_forms_without_offsets_say_what_to_use(form: str) -> None:
    with pytest.raises(UnsupportedError, match="nothing would be quantized.*no offsets.*use :zp in place of :min"):
        _export(form, scheme="uint4:c:min")


LOOP = """g (float[n, 1, 32] x) => (float[n, 1, 1, 16] y) {
    y = LSTM<hidden_size = 16>(x, w, r)
}"""


def test_matmulnbits_replaces_products_inside_loops(tmp_path: Path) -> None:
    path = tmp_path / "loop.onnx"
    onnx.save(proto(LOOP, {"w": noise(1, 64, 32), "r": noise(1, 64, 16)}), path)
    for form in ("onnx", "matmulnbits"):
        chosen = options.from_arguments(form=form, scheme="int4:b16", activations="float")
        driver.quantize_model(path, tmp_path / f"{form}.onnx", chosen)
    made = [ir.from_proto(onnx.load(tmp_path / f"{form}.onnx")) for form in ("onnx", "matmulnbits")]
    assert sum(node.op_type == "MatMulNBits" for node in made[1].graph.all_nodes()) == 2
    feeds = {"x": noise(3, 1, 32)}
    plain, other = (Session(model).run(feeds)["y"] for model in made)
    # Three steps of sums of 32 and 16 products; gates and tanh do not enlarge their errors.
    np.testing.assert_allclose(other, plain, rtol=0, atol=3 * 48 * SUM_ORDER)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block", [16, 32, 256])
def test_matmulnbits_has_real_zero_points(bits: int, block: int) -> None:
    export = _export("matmulnbits", scheme=f"uint{bits}:b{block}:min")
    model = matmulnbits.make(export)
    products = [node for node in model.graph if node.domain == "com.microsoft"]
    assert [node.name for node in products] == ["matmul4", "matmul6"]
    assert all(node.inputs[3].dtype == ir.DataType.FLOAT for node in products)  # type: ignore[union-attr]
    _assert_equal(export, model, SUM_ORDER + ZERO_ROUNDING)
    reasons = {entry.op_type: entry.reason for entry in export.plan.entries if entry.scheme is None}
    assert set(reasons) == {"Conv", "Gather"} and all("no offsets" in reason for reason in reasons.values())


def test_matmulnbits_widens_offsets_and_refuses_those_of_eight_bits() -> None:
    export = _export("matmulnbits", scheme="uint3:b32:min", widen=True)
    model = matmulnbits.make(export)
    assert {node.attributes.get_int("bits", 0) for node in model.graph if node.op_type == "MatMulNBits"} == {4}
    _assert_equal(export, model, SUM_ORDER + ZERO_ROUNDING)
    with pytest.raises(UnsupportedError, match="nothing would be quantized"):
        _export("matmulnbits", scheme="uint8:b32:min")


def test_the_next_wider_type_is_taken() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 1, 40)).astype(np.float32)
    found = {bits: widened(rtn.solve(weight, QuantScheme.parse(f"int{bits}:b16"))).bits for bits in range(1, 9)}
    assert found == {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@pytest.mark.parametrize("scheme", ["int2:b32", "int4:b32", "uint4:b16:f32", "int8:c", "uint8:t", "int4:b16/i4"])
def test_qdq_holds_standard_operators_only_and_gives_the_same_numbers(scheme: str, tmp_path: Path) -> None:
    export = _export("qdq", scheme=scheme)
    assert len(export.tensors) == 6
    size = qdq.write(export, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert size == (tmp_path / "model.onnx").stat().st_size
    assert not proto.functions and {node.domain for node in proto.graph.node} == {""}
    _assert_equal(export, ir.from_proto(proto))


@pytest.mark.parametrize("scheme", ["int3:b32", "uint5:b16", "nf4:b64", "int6:c", "int7:b32", "int1:b32", "fp4:b32"])
def test_qdq_widens_other_types_on_request_only(scheme: str) -> None:
    with pytest.raises(UnsupportedError, match="nothing would be quantized.*--widen"):
        _export("qdq", scheme=scheme)
    export = _export("qdq", scheme=scheme, widen=True)
    assert len(export.tensors) == 6
    model = qdq.make(export)
    assert not model.functions
    _assert_equal(export, model)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("family", ["int", "uint"])
def test_matmulnbits_gives_the_same_numbers(family: str, bits: int, block: int, tmp_path: Path) -> None:
    export = _export("matmulnbits", scheme=f"{family}{bits}:b{block}")
    matmulnbits.write(export, tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    products = [node for node in model.graph if node.domain == "com.microsoft"]
    assert [node.name for node in products] == ["matmul4", "matmul6"]
    attributes = {name: products[0].attributes.get_int(name, -1) for name in ("K", "N", "bits", "block_size")}
    assert attributes == {"K": 40, "N": 33, "bits": bits, "block_size": block}
    assert not [node for node in model.graph if node.op_type == "MatMul"]
    _assert_equal(export, model, SUM_ORDER)


def test_matmulnbits_widens_three_bits_to_four() -> None:
    export = _export("matmulnbits", scheme="int3:b32", widen=True)
    model = matmulnbits.make(export)
    assert {node.attributes.get_int("bits", 0) for node in model.graph if node.op_type == "MatMulNBits"} == {4}
    _assert_equal(export, model, SUM_ORDER)


def test_matmulnbits_refuses_what_it_lacks_in_products_and_keeps_the_rest() -> None:
    export = _export("matmulnbits", scheme="int4:b48")
    reasons = {entry.tensor: entry.reason for entry in export.plan.entries if entry.scheme is None}
    assert set(reasons) == {"first", "second"} and "blocks of 16, 32" in reasons["first"]


@pytest.mark.parametrize("scheme", ["int4:b32", "uint4:b32", "int8:b16", "uint8:b64"])
def test_matmulnbits_reads_back_as_the_same_weights(scheme: str) -> None:
    from kbitc.importer import load_model

    export = _export("matmulnbits", scheme=scheme)
    again = canonicalize(load_model(ir.to_proto(matmulnbits.make(export))))
    _assert_equal(export, again, SUM_ORDER)
    codes = {value.dtype for value in again.graph.initializers.values()}
    assert codes & {ir.DataType.UINT4, ir.DataType.UINT8}


def _decoded(folder: Path, name: str, bits: int, group: int) -> Any:
    """compressed-tensors' own unpacking in numpy: value = bits of the stream - 2^(bits - 1); (value - zero) * scale."""
    stored = load_file(folder / "model.safetensors")
    rows, columns = (int(size) for size in stored[f"{name}.weight_shape"])

    def unpack(words: Any, count: int) -> Any:
        stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        planes = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
        return (planes << np.arange(bits)).sum(2) - (1 << (bits - 1))

    values = unpack(stored[f"{name}.weight_packed"], columns)
    scale = stored[f"{name}.weight_scale"]
    zeros = np.zeros(scale.shape, np.int64)
    if f"{name}.weight_zero_point" in stored:
        zeros = unpack(stored[f"{name}.weight_zero_point"].T, rows).T
    spread = partial(np.repeat, repeats=group, axis=1)
    return (values - spread(zeros)).astype(np.float32) * spread(scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["int", "uint"])
def test_compressed_tensors_hold_the_same_weights(family: str, bits: int, tmp_path: Path) -> None:
    export = _export("compressed_tensors", scheme=f"{family}{bits}:c")
    size = compressed_tensors.write(export, tmp_path / "out")
    assert size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert set(export.tensors) == {"table", "first", "second"}
    for name, tensor in export.tensors.items():
        found = _decoded(tmp_path / "out", name, bits, tensor.shape[2])
        np.testing.assert_array_equal(found, tensor.dequantize()[:, 0, :])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(stored["stem"], export.original.graph.initializers["stem"].const_value.numpy())  # type: ignore[union-attr]


def test_compressed_tensors_of_groups_and_their_config(tmp_path: Path) -> None:
    export = _export("compressed_tensors", scheme="uint4:b16", exclude=["first", "second", "table"][:2])
    assert set(export.tensors) == {"table"}
    with pytest.raises(UnsupportedError, match="'table'.*40 channels in groups of 16.*--exclude"):
        compressed_tensors.write(export, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_compressed_tensors_config_groups_by_scheme(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": 1, "tensors": [{"tensor": "first", "scheme": "uint3:c"}]}))
    export = _export("compressed_tensors", scheme="int4:c", plan=plan, exclude=["second"])
    config = compressed_tensors.quantization_config(export)
    groups = {tuple(group["targets"]): group["weights"] for group in config["config_groups"].values()}
    assert {targets: (item["num_bits"], item["symmetric"]) for targets, item in groups.items()} == {
        ("table",): (4, True), ("first",): (3, False),
    }  # fmt: skip
    assert config["ignore"] == ["stem", "deep", "point", "second"]
    assert all(item["strategy"] == "channel" and item["group_size"] is None for item in groups.values())


def test_packing_is_that_of_the_compressed_tensors_package() -> None:
    """Words that `pack_to_int32` of compressed-tensors 0.20.0 gives for these codes."""
    codes = (np.arange(22, dtype=np.uint8).reshape(2, 11) * 5) % 8
    assert compressed_tensors.bit_words(codes, 3).tolist() == [[-1468477784, 0], [1733573735, 0]]
    assert compressed_tensors.bit_words(codes, 4).tolist() == [[907309648, 592], [620978503, 327]]


def test_a_kernel_that_quantizes_activations_is_not_written_silently() -> None:
    export = _export("qdq", scheme="int8:b32", activations="dynamic")
    assert {entry.activation for entry in export.plan.entries} == {"float32"}
    reason = next(entry.reason for entry in export.plan.entries if entry.tensor == "first")
    assert "quantized weights only" in reason


def test_an_unknown_form_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown format.*did you mean matmulnbits"):
        _export("matmulnbit")


def test_names_of_modules_lose_their_suffix() -> None:
    for name in ("encoder.query.weight", "encoder.query"):
        assert compressed_tensors.module(name) == "encoder.query"
