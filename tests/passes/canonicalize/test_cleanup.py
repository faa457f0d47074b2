"""Constants, shapes, identities, equal nodes, functions and branches."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc.errors import InternalError
from kbitc.graph.edit import constant
from kbitc.graph.evaluate import evaluate
from kbitc.graph.shapes import infer_shapes
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.base import PassResult, run_until_stable
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.canonicalize.drop_expand import DropExpand
from kbitc.passes.canonicalize.expand_composite import ExpandComposite
from kbitc.passes.canonicalize.finish import NameNodes, RemoveDeadCode, SortNodes
from kbitc.passes.canonicalize.fold_constants import FoldConstants
from kbitc.passes.canonicalize.fold_shapes import FoldShapes
from kbitc.passes.canonicalize.inline_constant_if import InlineConstantIf
from kbitc.passes.canonicalize.inline_functions import InlineFunctions
from kbitc.passes.canonicalize.lift_constants import LiftConstants
from kbitc.passes.canonicalize.merge_equal import MergeEqual
from kbitc.passes.canonicalize.remove_identity import RemoveIdentity
from kbitc.passes.canonicalize.to_float32 import ToFloat32
from tests.support.onnx_text import apply, assert_same, model, noise, operators, proto

INT = np.int64
INTS = {
    "zero": INT(0),
    "axis0": np.array([0], INT),
    "one1": np.array([1], INT),
    "two1": np.array([2], INT),
    "minus1": np.array([-1], INT),
}


def test_constants_are_folded() -> None:
    graph = "g (float[2, 4] x) => (float[] y) { t = Transpose(w) \n s = Mul(t, c) \n y = MatMul(x, s) }"
    subject = model(graph, {"w": noise(5, 4), "c": np.float32(2)})
    assert apply(FoldConstants(), subject)
    assert operators(subject) == {"MatMul": 1}


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("d = DequantizeLinear(q, s) \n y = MatMul(x, d)", {"q": np.ones((4, 5), np.int8), "s": np.float32(0.5)}),
        (
            "d = Expand(c, big) \n e = ReduceSum(d) \n y = Add(x, e)",
            {"c": np.float32(1), "big": np.array([300, 300], INT)},
        ),
        ("d = RandomNormalLike(c) \n e = Mul(d, z) \n y = Add(x, e)", {"c": noise(2, 4), "z": np.float32(0)}),
    ],
)
def test_some_constants_are_kept(nodes: str, weights: dict[str, np.ndarray]) -> None:
    """Quantized weights stay quantized, bombs stay unexploded, random numbers stay random."""
    subject = model(f"g (float[2, 4] x) => (float[] y) {{ {nodes} }}", weights)
    assert not FoldConstants()(subject).modified


def test_a_tied_weight_is_not_folded_into_two() -> None:
    graph = """g (float[2, 64] x, float[2, 128] z) => (float[] y) {
        t = Transpose(w) \n a = MatMul(x, t) \n b = MatMul(z, w) \n c = ReduceSum(b) \n y = Add(a, c)
    }"""
    assert not apply(FoldConstants(), model(graph, {"w": noise(128, 64)}))


def test_static_shapes_become_constants() -> None:
    graph = """g (float[2, 3, 4] x) => (float[] y) {
        s = Shape(x) \n a = Gather(s, axis0) \n b = Slice(s, one1, two1) \n m = Mul(a, b)
        t = Concat<axis = 0>(m, minus1) \n y = Reshape(x, t)
    }"""
    subject = model(graph, INTS)
    assert apply(FoldShapes(), subject)
    RemoveDeadCode()(subject)
    assert operators(subject) == {"Reshape": 1}
    assert constant(next(iter(subject.graph)).inputs[1]).tolist() == [6, -1]


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("Concat<axis = 0>(n, minus1)", [0, -1]),
        ("Concat<axis = 0>(n, r, four)", [0, 0, 4]),
        ("Concat<axis = 0>(n, two1, two1, r)", [0, 2, 2, -1]),
    ],
)
def test_dynamic_reshape_gets_a_constant_target(target: str, wanted: list[int]) -> None:
    graph = f"""g (float[N, R, 4] x) => (float[] y) {{
        s = Shape(x) \n n = Slice(s, axis0, one1) \n r = Slice(s, one1, two1)
        t = {target} \n y = Reshape(x, t)
    }}"""
    subject = model(graph, {**INTS, "four": np.array([4], INT)})
    assert apply(FoldShapes(), subject)
    reshape = next(node for node in subject.graph if node.op_type == "Reshape")
    assert constant(reshape.inputs[1]).tolist() == wanted


def test_a_target_with_two_open_dims_is_kept() -> None:
    graph = """g (float[N, R, 4] x) => (float[] y) {
        s = Shape(x) \n a = Slice(s, axis0, one1) \n b = Slice(s, one1, two1)
        t = Concat<axis = 0>(b, a, minus1) \n y = Reshape(x, t)
    }"""
    assert not apply(FoldShapes(), model(graph, INTS))


@pytest.mark.parametrize(
    "node",
    [
        "y = Identity(a)", "y = Dropout(a)", "y = Cast<to = 1>(a)", "y = Transpose<perm = [0, 1]>(a)", "y = Add(a, z)",
        "y = Mul(o, a)", "y = Div(a, o)", "y = Sub(a, z)", "y = Concat<axis = 0>(a)", "y = Reshape(a, same)",
        "y = Expand(a, same)", "y = Pow(a, o)", "y = Slice(a, axis0, huge)", "y = Pad(a, pads)",
    ],
)  # fmt: skip
def test_identities_go(node: str) -> None:
    weights = {
        "z": np.float32(0), "o": np.float32(1), "same": np.array([2, 4], INT), "axis0": np.array([0], INT),
        "huge": np.array([2**63 - 1], INT), "pads": np.zeros(4, INT),
    }  # fmt: skip
    used = {name: array for name, array in weights.items() if f"{name}" in node.split("=", 1)[1]}
    subject = model(f"g (float[2, 4] x) => (float[] y) {{ a = Relu(x) \n {node} }}", used)
    assert apply(RemoveIdentity(), subject)
    assert operators(subject) == {"Relu": 1}


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("y = Identity(x)", {}),  # an output needs a node that makes it
        ("y = Cast<to = 11>(x)", {}),
        ("a = Relu(x) \n y = Add(a, z)", {"z": np.zeros((3, 2, 4), np.float32)}),  # widens
        ("a = Relu(x) \n y = Add(a, z)", {"z": np.full((), -0.0, np.float32)}),  # x + -0 is x, but say so elsewhere
        ("a = Relu(x) \n y = Div(z, a)", {"z": np.float32(1)}),
        ("a = Relu(x) \n y = Reshape(a, s)", {"s": np.array([4, 2], INT)}),
        ("a = Relu(x) \n y = Transpose(a)", {}),
    ],
)
def test_not_identities(node: str, weights: dict[str, np.ndarray]) -> None:
    assert not apply(
        RemoveIdentity(),
        model(
            f"g (float[2, 4] x) => (double[] y) {{ {node} }}".replace("double" if "11" not in node else "-", "float"),
            weights,
        ),
    )


def test_equal_weights_and_nodes_are_merged() -> None:
    graph = "g (float[2, 4] x) => (float[] y) { a = MatMul(x, v) \n b = MatMul(x, w) \n y = Add(a, b) }"
    subject = model(graph, {"v": noise(4, 5), "w": noise(4, 5)})
    assert apply(MergeEqual(), subject)
    assert operators(subject) == {"Add": 1, "MatMul": 1}
    assert list(subject.graph.initializers) == ["v"]


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Softmax<axis = 0>(x) \n b = Softmax<axis = 1>(x) \n y = Add(a, b)",
        "a = RandomNormalLike(x) \n b = RandomNormalLike(x) \n c = Sub(a, a) \n y = Add(x, c)",
        "a = Sub(x, w) \n b = Sub(w, x) \n y = Add(a, b)",
    ],
)
def test_unequal_nodes_are_not_merged(nodes: str) -> None:
    subject = model(f"g (float[2, 4] x) => (float[] y) {{ {nodes} }}", {"w": noise(2, 4)})
    assert not MergeEqual()(subject).modified


def test_two_equal_outputs_stay_two() -> None:
    subject = model("g (float[2] x) => (float[] y, float[] z) { y = Relu(x) \n z = Relu(x) }")
    assert not apply(MergeEqual(), subject)


def test_expand_before_an_elementwise_operator_goes() -> None:
    graph = "g (float[N, 4] x) => (float[] y) { s = Shape(x) \n e = Expand(w, s) \n y = Mul(x, e) }"
    subject = model(graph, {"w": noise(4)})
    assert apply(DropExpand(), subject)


def test_expand_that_widens_stays() -> None:
    graph = "g (float[1, 4] x) => (float[] y) { e = Expand(w, s) \n y = Mul(x, e) }"
    assert not apply(DropExpand(), model(graph, {"w": noise(4), "s": np.array([3, 4], INT)}))


FUNCTIONS = """
<domain: "my", opset_import: ["" : 17]>
Half <axes> (X) => (Y) { S = ReduceMean<axes: ints = @axes, keepdims = 0>(X)  Y = Add(S, S) }
"""


def test_functions_are_inlined_before_they_are_upgraded() -> None:
    """The body has ReduceMean with an attribute, as opset 17 has it, and the attribute comes from the call."""
    graph = "g (float[2, 1, 3] x) => (float[] y) { y = my.Half<axes = [2]>(x) }"
    message = proto(graph, opset=17, functions=FUNCTIONS, domains=', "my" : 1')
    subject = load_model(message)
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    canonicalize(subject)
    assert not subject.functions and list(subject.opset_imports) == [""]
    assert_same(before, evaluate(subject, feeds))


def test_own_functions_are_kept() -> None:
    text = '<domain: "kbitc", opset_import: ["" : 21]> Twice (X) => (Y) { Y = Add(X, X) }'
    message = proto("g (float[2] x) => (float[2] y) { y = kbitc.Twice(x) }", functions=text, domains=', "kbitc" : 1')
    subject = load_model(message)
    assert not InlineFunctions()(subject).modified
    assert operators(subject) == {"kbitc::Twice": 1}


BRANCHES = """g (float[2] x) => (float[] y) {
    %s
    y = If (flag) <
        then_branch = a () => (float[2] r) { c = Constant<value = float[2] {1.0, 2.0}>() r = Add(x, c) },
        else_branch = b () => (float[2] q) { q = Neg(x) }
    >
}"""


@pytest.mark.parametrize("flag", [True, False])
def test_constant_if_is_inlined(flag: bool) -> None:
    subject = model(BRANCHES % "", {"flag": np.array(flag)})
    assert apply(InlineConstantIf(), subject)
    assert "If" not in operators(subject)


def test_if_on_an_input_is_kept() -> None:
    subject = model(BRANCHES % "s = ReduceSum<keepdims = 0>(x) \n flag = Greater(s, z)", {"z": np.float32(0)})
    assert not apply(InlineConstantIf(), subject)


def test_constants_in_branches_are_lifted() -> None:
    subject = model(BRANCHES % "s = ReduceSum<keepdims = 0>(x) \n flag = Greater(s, z)", {"z": np.float32(0)})
    assert apply(LiftConstants(), subject)
    assert "Constant" not in operators(subject)


@pytest.mark.parametrize(
    ("nodes", "gone"),
    [
        ("y = Attention<is_causal = 1>(x, x, x)", "Attention"),
        ("y = RotaryEmbedding(x, angles, angles)", "RotaryEmbedding"),
        ("y = RMSNormalization(x, scale)", ""),
    ],
)
def test_composite_operators_are_expanded(nodes: str, gone: str) -> None:
    """Operators of opset 23 that no emitter exists for become ONNX's own bodies; the others stay whole."""
    known = {"angles": noise(2, 5, 4), "scale": noise(8)}
    weights = {name: array for name, array in known.items() if name in nodes}
    subject = model(f"g (float[2, 3, 5, 8] x) => (float[] y) {{ {nodes} }}", weights, opset=23)
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    assert ExpandComposite()(subject).modified == bool(gone)
    canonicalize(subject)
    assert not gone or gone not in operators(subject)
    assert_same(before, evaluate(subject, feeds), terms=64)


def test_lowerable_and_bodiless_operators_are_not_expanded() -> None:
    subject = model("g (float[4, 4] x) => (float[] y) { a = Softmax(x) \n y = Det(a) }")
    assert not ExpandComposite()(subject).modified


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_floats_are_computed_in_float32(kind: str) -> None:
    """The signature keeps its types; half precision is only rounded at the end."""
    dtype = {"float16": np.float16, "double": np.float64}[kind]
    graph = f"""g ({kind}[2, 8] x) => ({kind}[] y) {{
        a = MatMul(x, w) \n b = Cast<to = 1>(a) \n c = CastLike(b, a) \n y = Mul(c, c)
    }}"""
    subject = model(graph, {"w": noise(8, 4).astype(dtype)})
    feeds = made_up_feeds(subject)
    exact = (feeds["x"].astype(np.float64) @ noise(8, 4).astype(dtype).astype(np.float64)) ** 2
    assert ToFloat32()(subject).modified
    infer_shapes(subject)
    assert not any(value.dtype == subject.graph.inputs[0].dtype for value in subject.graph.initializers.values())
    found = evaluate(canonicalize(subject), feeds)["y"]
    assert found.dtype == dtype
    step = float(np.finfo(np.float16).eps if kind == "float16" else 2.0**-23)
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=step, atol=64 * 2.0**-24)
    assert not ToFloat32()(subject).modified


def test_float32_models_are_left_alone() -> None:
    assert not apply(ToFloat32(), model("g (float[2] x) => (float[] y) { y = Relu(x) }"))


def test_dead_code_goes_and_unused_inputs_stay() -> None:
    subject = model(
        "g (float[2] x, float[3] unused) => (float[] y) { d = Neg(x) \n e = Exp(d) \n y = Relu(x) }", {"w": noise(3)}
    )
    assert apply(RemoveDeadCode(), subject)
    assert operators(subject) == {"Relu": 1} and not subject.graph.initializers
    assert [value.name for value in subject.graph.inputs] == ["x", "unused"]


def test_names_and_order() -> None:
    subject = model("g (float[2] x) => (float[] y) { a = Neg(x) \n y = Relu(a) }")
    for node in subject.graph:
        node.name = "same"
    assert NameNodes()(subject).modified
    assert [node.name for node in subject.graph] == ["same", "same_1"]
    assert not apply(NameNodes(), subject)
    assert not apply(SortNodes(), subject)


def test_passes_that_fight_are_reported() -> None:
    class Restless:
        def __call__(self, subject: ir.Model) -> PassResult:
            return PassResult(subject, True)

    with pytest.raises(InternalError, match="Restless"):
        run_until_stable(model("g (float[2] x) => (float[] y) { y = Relu(x) }"), (Restless(),), limit=3)


def test_a_constant_output_survives() -> None:
    message = proto("g (float[2] x) => (float[2] c, float[] y) { y = Relu(x) }", {"c": noise(2)})
    subject = canonicalize(load_model(message))
    np.testing.assert_array_equal(evaluate(subject, {"x": noise(2)})["c"], noise(2))
    assert isinstance(message, onnx.ModelProto)


@pytest.mark.parametrize(("first", "folded"), [("n", True), ("none", False)])
def test_allowzero_matters_only_where_a_zero_is_asked_for(first: str, folded: bool) -> None:
    graph = f"""g (float[N, R, 4] x) => (float[] y) {{
        s = Shape(x) \n n = Slice(s, axis0, one1) \n r = Slice(s, one1, two1)
        t = Concat<axis = 0>({first}, r, two1, two1) \n y = Reshape<allowzero = 1>(x, t)
    }}"""
    subject = model(graph, {**INTS, "none": np.array([0], INT)})
    if not folded:
        assert not FoldShapes()(subject).modified
        return
    assert apply(FoldShapes(), subject)
    reshape = next(node for node in subject.graph if node.op_type == "Reshape")
    assert constant(reshape.inputs[1]).tolist() == [0, 0, 2, 2] and "allowzero" not in reshape.attributes
