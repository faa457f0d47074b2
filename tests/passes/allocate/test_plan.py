"""Which weights are found, what the patterns exclude, and what forces an exception from the asked scheme."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.errors import UsageError
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from kbitc.quant.plan import QuantPlan
from kbitc.targets.target import parse_target

BODY = """g (float[1, 3, 8, 8] x, int64[b] i) => (float[1, 6, 6, 6] y, float[b, 4] z) {
    c = Conv(x, stem)
    y = Conv<group = 6, pads = [1, 1, 1, 1]>(c, deep)
    e = Gather(table, i)
    h = MatMul(e, first)
    k = MatMul(h, first)
    s = MatMul(constant3, third)
    q = ReduceSum<keepdims = 0>(s)
    z0 = MatMul(k, second)
    z = Add(z0, q)
}"""


def _model() -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {BODY}')
    random = np.random.default_rng(0)
    shapes = {
        "stem": (6, 3, 3, 3), "deep": (6, 1, 3, 3), "table": (9, 32), "first": (32, 32), "second": (32, 4),
        "third": (2, 3, 5), "constant3": (2, 4, 3),
    }  # fmt: skip
    for name, shape in shapes.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type.lower()}{index}"
    return model


def _plan(model: ir.Model | None = None, *exclude: str, scheme: str = "int4:b32") -> QuantPlan:
    chosen = options.from_arguments(scheme=scheme, exclude=exclude)
    return driver.make_plan(model or _model(), chosen, parse_target("reference"))[0]


def _float(plan: QuantPlan) -> set[str]:
    return {entry.tensor for entry in plan.entries if entry.scheme is None}


def test_every_weight_is_listed_once_with_its_users() -> None:
    plan = _plan()
    assert [entry.tensor for entry in plan.entries] == ["stem", "deep", "table", "first", "third", "second"]
    assert next(entry for entry in plan.entries if entry.tensor == "first").nodes == ("matmul3", "matmul4")


def test_what_cannot_be_quantized_says_why() -> None:
    entry = next(entry for entry in _plan().entries if entry.tensor == "third")
    assert entry.scheme is None and "rank 3" in entry.reason


def test_a_convolution_with_few_channels_gets_one_scale_a_channel_and_float_activations() -> None:
    entries = {entry.tensor: entry for entry in _plan().entries}
    for name in ("stem", "deep"):
        assert str(entries[name].scheme) == "int4:c"
        assert entries[name].activation == "float32"
        assert "one scale a channel" in entries[name].reason
    assert str(entries["first"].scheme) == "int4:b32" and entries["first"].activation == "int8"


ROTARY = """g (float[b, 4, s, 16] x, int64[b, s] i, float[b, s, 1] kept) => (float[b, 4, s, 16] y, float[b, s, 9] z) {
    c = Gather(cosines, i)
    axis = Constant<value_ints = [1]>()
    u = Unsqueeze(c, axis)
    h = Relu(x)
    y = Mul(h, u)
    e = Gather(words, i)
    f = Gather(others, i)
    m = Mul(e, f)
    n = Mul(e, kept)
    o = Add(m, n)
    z = MatMul(o, last)
}"""


def test_rows_that_are_factors_stay_float_unless_of_a_mask_or_of_other_rows() -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {ROTARY}')
    random = np.random.default_rng(0)
    for name, shape in {"cosines": (9, 16), "words": (9, 32), "others": (9, 32), "last": (32, 9)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name))
    plan = _plan(canonicalize(load_model(proto)))
    assert _float(plan) == {"cosines"}
    assert "factors" in next(entry.reason for entry in plan.entries if entry.tensor == "cosines")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("table", {"table"}),
        ("matmul3", {"first"}),
        ("s*", {"stem", "second"}),
        ("type:Conv", {"stem", "deep"}),
        ("matmul?", {"first", "second"}),
    ],
)
def test_exclude_patterns(pattern: str, expected: set[str]) -> None:
    assert _float(_plan(None, pattern)) == expected | {"third"}


def test_a_misspelled_exclude_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'matmul33'.*did you mean matmul3"):
        _plan(None, "table", "matmul33")


def test_all_excludes_that_match_nothing_are_listed() -> None:
    with pytest.raises(UsageError, match="'nope1', 'nope2'"):
        _plan(None, "nope1", "table", "nope2")


def test_an_exclude_of_an_absent_type_names_the_types() -> None:
    with pytest.raises(UsageError, match="type:Conv"):
        _plan(None, "type:Convo")


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_weights_outside_the_range_of_f16_scales_get_f32_scales(factor: float) -> None:
    model = _model()
    value = model.graph.initializers["first"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name="first")
    entry = next(entry for entry in _plan(model).entries if entry.tensor == "first")
    assert str(entry.scheme) == "int4:b32:f32" and "f32 scales" in entry.reason


def test_float32_keeps_every_weight() -> None:
    assert len(_float(_plan(scheme="float32"))) == 6


def test_the_plan_is_readable_json() -> None:
    data = json.loads(_plan().text())
    assert data["tensors"][3]["tensor"] == "first" and data["tensors"][3]["scheme"] == "int4:b32"
