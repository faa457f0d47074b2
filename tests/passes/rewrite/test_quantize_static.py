"""Static integer graphs: what runs on integers, that every runtime value is within its bound, and what stays float."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.errors import UsageError
from kbitc.graph import legality
from kbitc.graph.evaluate import evaluate
from kbitc.graph.text import operator_counts
from kbitc.importer.feeds import made_up_feeds
from kbitc.options import Method
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import account, solve_weights
from kbitc.quant.plan import QuantPlan
from kbitc.static import plan_static
from kbitc.targets.target import parse_target
from tests.support.onnx_text import model, noise
from tests.support.steps import check_steps

Array = npt.NDArray[Any]


class Samples(NamedTuple):
    original: ir.Model
    calibration: Any
    carried: None = None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def quantized(
    graph: str, weights: dict[str, Array], feeds: list[dict[str, Array]] | None = None, **chosen: Any
) -> tuple[ir.Model, ir.Model, QuantPlan, list[dict[str, Array]]]:
    """(canonical float model, integer model, plan, calibration feeds)."""
    original = canonicalize(model(graph, weights))
    feeds = feeds or [made_up_feeds(original, seed=seed) for seed in range(3)]
    wishes = options.from_arguments(**({"bits": 8, "activations": "static"} | chosen))
    plan, kinds = driver.make_plan(original, wishes, parse_target("reference"))
    solved = solve_weights(original, plan, kinds, Method("rtn"))
    weights = account(solved, plan, kinds)
    plan, _ = plan_static(Samples(original, feeds), plan, solved.tensors, weights, wishes)
    made = rewrite(original, plan, solved.tensors, kinds)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert legality.after_rewrite(made) == []
    return original, made, plan, feeds


def forms(plan: QuantPlan) -> dict[str, str]:
    assert plan.static is not None
    return {entry.op_type: entry.form for entry in plan.static.nodes}


def reasons(plan: QuantPlan) -> str:
    assert plan.static is not None
    return "; ".join(entry.reason for entry in plan.static.nodes)


def inner_nodes(made: ir.Model) -> list[ir.Node]:
    return [node for node in made.graph if node.op_type != "DequantizeLinear"]


CONV = "c = Conv<pads = [1, 1, 1, 1]>(x, w, b)"
IMAGE = {"w": noise(6, 3, 3, 3), "b": noise(6), "v": noise(5, 6, 1, 1, seed=1)}
# Families between two convolutions, so that both sides are codes.
CASES = {
    "relu": ("r = Relu(c)", "ConvInteger", "Relu"),
    "clip": ("z = Constant<value_float = -0.5>() o = Constant<value_float = 0.7>() r = Clip(c, z, o)", "", "Clip"),
    "function": ("r = HardSwish(c)", "kbitc::Table", "HardSwish"),
    "meeting point": ("s = Sigmoid(c) r = Mul(c, s)", "kbitc::Table", "Mul"),
    "chain": ("t = Constant<value_float = 2.0>() d = Mul(c, t) s = Tanh(d) r = Add(s, t)", "kbitc::Table", "Tanh"),
    "add": ("d = Conv<pads = [1, 1, 1, 1]>(x, u) r = Add(c, d)", "kbitc::IntegerAdd", "Add"),
    "sub": ("d = Conv<pads = [1, 1, 1, 1]>(x, u) r = Sub(d, c)", "kbitc::IntegerAdd", "Sub"),
    "limited sum": ("d = Conv<pads = [1, 1, 1, 1]>(x, u) e = Add(c, d) r = Relu(e)", "kbitc::IntegerAdd", "Relu"),
    "constant operand": ("r = Add(c, k)", "kbitc::IntegerAdd", "Add"),
    "slope a channel": ("r = PRelu(c, s)", "kbitc::IntegerPRelu", "PRelu"),
    "product": ("g = GlobalAveragePool(c) s = Sigmoid(g) r = Mul(c, s)", "kbitc::IntegerMul", "Mul"),
    "max pool": ("r = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)", "MaxPool", "MaxPool"),
    "mean pool": ("r = AveragePool<kernel_shape = [2, 3], strides = [2, 2]>(c)", "ConvInteger", "AveragePool"),
    "global mean": ("r = GlobalAveragePool(c)", "ReduceSum", "GlobalAveragePool"),
    "global max": ("r = GlobalMaxPool(c)", "ReduceMax", "GlobalMaxPool"),
    "resize": (
        "e = Constant<value = float[0] {}>() f = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() "
        'r = Resize<mode = "nearest">(c, e, f)', "Resize", "Resize",
    ),
    "movement": ("t = Transpose<perm = [0, 1, 3, 2]>(c) r = Relu(t)", "Transpose", "Transpose"),
    "padding": ("p = Constant<value_ints = [0, 0, 1, 0, 0, 0, 0, 2]>() r = Pad(c, p)", "Pad", "Pad"),
    "concat": ("d = Conv<pads = [1, 1, 1, 1]>(x, u) e = Concat<axis = 2>(c, d) r = Relu(e)", "Concat", "Concat"),
}  # fmt: skip


def between(middle: str) -> tuple[str, dict[str, Array]]:
    graph = f"g (float[N, 3, 12, 10] x) => (float[] y) {{ {CONV} {middle} y = Conv(r, v) }}"
    weights = dict(IMAGE)
    if "u)" in middle:
        weights["u"] = noise(6, 3, 3, 3, seed=2)
    if "PRelu" in middle:
        weights["s"] = noise(6, 1, 1, seed=3) / 2
    if "k)" in middle:
        weights["k"] = noise(1, 6, 1, 10)
    return graph, weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [8, 6])
def test_every_family_runs_on_integers(case: str, bits: int) -> None:
    middle, wanted, op_type = CASES[case]
    original, made, plan, feeds = quantized(*between(middle), act_bits=bits)
    assert forms(plan)[op_type] == "integer", reasons(plan)
    counts = operator_counts(made)
    assert not wanted or counts[wanted]
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    assert "Conv" not in counts
    assert all(value.dtype != ir.DataType.FLOAT for node in inner_nodes(made) for value in node.outputs)
    assert check_steps(original, made, plan, feeds[0]) >= 2


def test_a_slope_that_is_computed_stays_float() -> None:
    _, made, plan, _ = quantized(*between("g = GlobalAveragePool(c) r = PRelu(c, g)"))
    assert forms(plan)["PRelu"] == "float" and "its slope is not a constant" in reasons(plan)
    assert "PRelu" in operator_counts(made)


def test_a_chain_is_one_table_and_limits_cost_no_table() -> None:
    assert operator_counts(quantized(*between(CASES["chain"][0]))[1])["kbitc::Table"] == 1
    assert operator_counts(quantized(*between(CASES["meeting point"][0]))[1])["kbitc::Table"] == 1
    for case in ("relu", "clip", "limited sum"):
        assert "kbitc::Table" not in operator_counts(quantized(*between(CASES[case][0]))[1])


def test_relu_is_the_lower_limit_of_the_requantization() -> None:
    _, made, _, _ = quantized(*between("r = Relu(c)"))
    node = next(node for node in made.graph if node.op_type == "Requantize")
    assert (node.attributes.get_int("low", -1), node.attributes.get_int("high", -1)) == (0, 255)
    _, made, plan, _ = quantized(*between(CASES["clip"][0]))
    node = next(node for node in made.graph if node.op_type == "Requantize")
    assert plan.static is not None
    codes = plan.static.codes("r")
    assert node.attributes.get_int("low", -1) == codes.code_of(-0.5)
    assert node.attributes.get_int("high", -1) == codes.code_of(0.7)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_codes_keep_to_their_bits(bits: int) -> None:
    _, made, plan, feeds = quantized(*between(CASES["add"][0]), act_bits=bits)
    assert plan.static is not None
    large = {"x": 10 * feeds[0]["x"]}
    found = evaluate(made, large, ["x.q", "c.q", "d.q", "r.q"])
    assert found["c.q"].max() == found["d.q"].max() == 2**bits - 1
    assert found["x.q"].max() == found["r.q"].max() == 255, "read by the first and the last layer"


@pytest.mark.parametrize("scheme", ["int8:c", "int4:c", "nf3:c", "int4:b16/i4", "int8:t"])
def test_the_accumulator_is_the_exact_integer(scheme: str) -> None:
    """x.q and the levels against an int64 product in numpy."""
    weights = {"w": noise(40, 7), "b": noise(7)}
    graph = "g (float[N, 40] x) => (float[N, 7] y) { m = MatMul(x, w) y = Add(m, b) }"
    original, made, plan, feeds = quantized(graph, weights, bits=None, scheme=scheme)
    name = next(node.outputs[0].name for node in made.graph if node.op_type == "Add") or ""
    product = next(node for node in made.graph if node.op_type == "MatMulInteger")
    level_name = (product.inputs[1].name if product.inputs[1] is not None else "") or ""
    inner = [] if level_name in made.graph.initializers else [level_name]
    found = evaluate(made, feeds[0], ["x.q", name, *inner])
    held = made.graph.initializers.get(level_name)
    levels = found[level_name] if inner else held.const_value.numpy()  # type: ignore[union-attr]
    assert plan.static is not None
    codes = plan.static.codes("x")
    assert levels.dtype == np.int8
    sums = (found["x.q"].astype(np.int64) - codes.zero) @ levels.astype(np.int64)
    difference = found[name] - sums
    assert (difference == difference[:1]).all(), "a bias a channel"
    scales = np.asarray(made.graph.initializers["y.scale"].const_value.numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(difference[0] * scales, weights["b"], atol=float(scales.max()))
    np.testing.assert_array_equal(found["y"], found[name].astype(np.float32) * scales)


def test_attention_runs_its_products_on_integers_and_softmax_on_floats() -> None:
    graph = """g (float[N, 12, 16] x) => (float[] y) {
        q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)
        t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) p = Softmax(s) o = MatMul(p, v) y = MatMul(o, d) }"""
    weights = {name: noise(16, 16, seed=index) / 4 for index, name in enumerate("abcd")}
    original, made, plan, feeds = quantized(graph, weights)
    counts = operator_counts(made)
    assert counts["MatMulInteger"] == 6 and "MatMul" not in counts and counts["Softmax"] == 1
    assert counts["QuantizeLinear"] == 2, "x and the probabilities"
    assert check_steps(original, made, plan, feeds[0])


def test_a_sum_with_a_float_operand_stays_float() -> None:
    """A residual around a LayerNormalization: codes would only be read by the normalization, which is float."""
    graph = """g (float[N, 16] x) => (float[] y) {
        n = LayerNormalization(x, g) m = MatMul(n, w) s = Add(m, x) y = LayerNormalization(s, g) }"""
    original, made, plan, feeds = quantized(graph, {"w": noise(16, 16), "g": noise(16)})
    assert forms(plan) == {"LayerNormalization": "float", "MatMul": "integer", "Add": "float"}
    assert operator_counts(made)["DequantizeLinear"] == 1 and "kbitc::Requantize" not in operator_counts(made)
    assert check_steps(original, made, plan, feeds[0])


@pytest.mark.parametrize(
    ("between", "form"),
    [
        ("f = Add(e, guard) y = Log(f)", "float"),
        ("f = Clip(e, guard) g = Max(f, guard) y = Log(g)", "float"),
        ("f = Relu(e) y = Sqrt(f)", "integer"),
        ("f = Add(e, guard) g = Log(f) h = Sub(g, f) y = Neg(h)", "integer"),
    ],
)
def test_a_product_in_front_of_a_logarithm_stays_float(between: str, form: str) -> None:
    """Energies of filters: a step of the largest is more than all of the small ones."""
    text = f"g (float[n, 16] x) => (float[n, 4] y) {{ s = Mul(x, x) e = MatMul(s, w) {between} }}"
    _, _, plan, _ = quantized(text, {"w": np.abs(noise(16, 4)), "guard": np.float32(1e-5)})
    assert forms(plan)["MatMul"] == form


def test_values_that_are_read_both_ways_are_rounded_once() -> None:
    """The sum is an output and is read by a convolution: both see the same codes."""
    graph, weights = between(CASES["add"][0])
    graph = graph.replace("(float[] y)", "(float[] y, float[] r)")
    original, made, plan, feeds = quantized(graph, weights)
    found = evaluate(made, feeds[0], ["r.q"])
    assert sorted(set(found) - {"r.q"}) == ["r", "y"]
    assert check_steps(original, made, plan, feeds[0])


def test_parts_of_a_split_that_only_floats_read_become_float_again() -> None:
    text = """
g (float[2, 5, 12] x) => (float[] y, float[] k, float[] v) {
  p = MatMul(x, w) q, k, r = Split<axis = -1, num_outputs = 3>(p)
  t = Transpose<perm = [0, 2, 1]>(r) y = MatMul(q, t) v = Exp(r)
}"""
    original, made, plan, feeds = quantized(text, {"w": noise(12, 24)}, None)
    assert forms(plan)["Split"] == "integer"
    assert check_steps(original, made, plan, feeds[0]) >= 2


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    size = 70_000
    weights = {"w": np.ones((size, 1), np.float32), "v": np.ones((1, 4), np.float32)}
    graph = f"g (float[N, {size}] x) => (float[] y) {{ m = MatMul(x, w) y = MatMul(m, v) }}"
    original, made, plan, feeds = quantized(graph, weights, [{"x": np.abs(noise(1, size))}])
    assert plan.static is not None
    first, second = plan.static.nodes
    assert first.form == "float" and "overflow int32" in first.reason and str(size * 255 * 127) in first.reason
    assert second.form == "integer" and second.proof is not None and second.proof.bound == 255 * 127
    assert plan.entries[0].activation == "float32" and plan.entries[1].activation == "uint8"


def test_weights_with_block_scales_are_declined_by_name() -> None:
    graph = "g (float[N, 64] x) => (float[] y) { y = MatMul(x, w) }"
    _, made, plan, _ = quantized(graph, {"w": noise(64, 8)}, scheme="int4:b32", bits=None)
    assert "use int4:c or int4:b32/i4" in reasons(plan) and "MatMulInteger" not in operator_counts(made)


def test_an_excluded_weight_keeps_its_node_float() -> None:
    graph, weights = between("r = Relu(c)")
    _, made, plan, _ = quantized(graph, weights, exclude=("v",))
    assert "excluded by 'v'" in reasons(plan)
    assert operator_counts(made)["Conv"] == operator_counts(made)["ConvInteger"] == 1


def test_numbers_that_are_not_finite_keep_a_node_float() -> None:
    graph = """g (float[N, 8] x) => (float[] y) {
        i = Constant<value_float = 1e38>() m = MatMul(x, w) a = Mul(m, i) y = MatMul(a, w) }"""
    _, _, plan, _ = quantized(graph, {"w": noise(8, 8)}, [{"x": 3 * noise(2, 8)}])
    assert "not finite on the calibration data" in reasons(plan)


def test_first_and_last_layers_read_8_bits() -> None:
    graph, weights = between("r = Relu(c) q = Conv(r, z) s = Relu(q)")
    graph = graph.replace("y = Conv(r, v)", "y = Conv(s, v)")
    weights["z"] = noise(6, 6, 1, 1, seed=5)
    _, _, plan, _ = quantized(graph, weights, act_bits=4)
    assert plan.static is not None
    assert [plan.static.codes(name).bits for name in ("x", "r", "s")] == [8, 4, 8]


def test_equal_inputs_give_equal_graphs() -> None:
    texts = {ir.to_proto(quantized(*between(CASES["product"][0]))[1]).SerializeToString() for _ in range(2)}
    assert len(texts) == 1


def test_static_needs_samples_and_sane_numbers() -> None:
    with pytest.raises(UsageError, match="4 to 8"):
        options.from_arguments(activations="static", act_bits=3)
    with pytest.raises(UsageError, match="add --activations static"):
        options.from_arguments(act_bits=8)
    with pytest.raises(UsageError, match="unknown observer"):
        quantized(*between("r = Relu(c)"), observer="minmix")
    original = canonicalize(model(*between("r = Relu(c)")))
    wishes = options.from_arguments(bits=8, activations="static")
    with pytest.raises(UsageError, match="--calibration"):
        plan_static(Samples(original, None), QuantPlan(()), {}, (), wishes)


def test_weights_inside_a_loop_are_said_to_meet_floats() -> None:
    """More than 16 steps become a Scan, into which no calibration sees."""
    graph = """g (float[20, 1, 16] x) => (float[] y) {
        h, last, cell = LSTM<hidden_size = 16>(x, w, r) f = Flatten(last) y = MatMul(f, v) }"""
    weights = {"w": noise(1, 64, 16), "r": noise(1, 64, 16, seed=1), "v": noise(16, 4)}
    _, made, plan, _ = quantized(graph, weights)
    assert operator_counts(made)["Scan"] == 1
    (inside,) = (entry for entry in plan.entries if entry.nodes == ("h.forward.MatMul",))
    assert inside.scheme is not None and inside.activation == "float32"
    assert inside.reason == "float activations: no node of the main graph reads it"
