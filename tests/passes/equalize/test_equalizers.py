"""Equalizers keep what the model computes, change what they say they change, and leave the rest alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kbitc import catalog, driver
from kbitc.errors import UsageError
from kbitc.graph import edit
from kbitc.graph.evaluate import Session, evaluate
from kbitc.options import Method, from_arguments
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import input_peaks, output_peaks
from kbitc.passes.equalize.hadamard import hadamard, turn
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.targets.target import parse_target
from tests.support.onnx_text import Array, assert_same, model, noise

NORM = "LayerNormalization<axis=-1, epsilon=0.00001>"
#: Name -> graph, weights, the equalizers that change it.
CASES: dict[str, tuple[str, dict[str, Array], set[str]]] = {
    "layer norm": (
        f"(float[n, 32] x) => (float[n, 8] y, float[n, 4] z) {{ v = {NORM}(x, g, b) "
        "y = MatMul(v, w) z = MatMul(v, u) }",
        {"g": noise(32) + 2, "b": noise(32), "w": noise(32, 8), "u": noise(32, 4)},
        {"smoothquant", "awq"},
    ),
    "layer norm with a residual": (
        f"(float[n, 32] x) => (float[n, 8] y, float[n, 32] z) {{ v = {NORM}(x, g, b) y = MatMul(v, w) z = Add(v, x) }}",
        {"g": noise(32) + 2, "b": noise(32), "w": noise(32, 8)},
        {"norm_outliers", "awq"},
    ),
    "product, bias, relu, product": (
        "(float[n, 32] x) => (float[n, 8] y) { a = MatMul(x, u) c = Add(a, b) v = Relu(c) y = MatMul(v, w) }",
        {"u": noise(32, 48), "b": noise(48), "w": noise(48, 8)},
        {"smoothquant", "awq", "cross_layer"},
    ),
    "convolutions": (
        "(float[n, 16, 6, 6] x) => (float[n, 8, 2, 2] y) "
        "{ a = Conv(x, u, b) v = LeakyRelu<alpha=0.1>(a) c = Conv<group=24>(v, d) e = Relu(c) y = Conv(e, w) }",
        {"u": noise(24, 16, 1, 1), "b": noise(24), "d": noise(24, 1, 3, 3), "w": noise(8, 24, 3, 3)},
        {"smoothquant", "awq", "cross_layer"},
    ),
    "constant factor": (
        "(float[n, 32] x) => (float[n, 8] y) { e = Exp(x) v = Mul(g, e) y = MatMul(v, w) }",
        {"g": noise(32) + 2, "w": noise(32, 8)},
        {"smoothquant", "awq"},
    ),
    "attention": (
        "(float[n, 5, 32] x, float[n, 2, 5, 5] p) => (float[n, 5, 32] y) "
        "{ a = MatMul(x, u) c = Add(a, b) h = Reshape(c, s) t = Transpose<perm=[0,2,1,3]>(h) m = MatMul(p, t) "
        "q = Transpose<perm=[0,2,1,3]>(m) v = Reshape(q, r) y = MatMul(v, w) }",
        {
            "u": noise(32, 32), "b": noise(32), "w": noise(32, 32, seed=1),
            "s": np.array([0, 5, 2, 16]), "r": np.array([0, 5, 32]),
        },
        {"hadamard", "awq"},
    ),
    "nonlinearity between": (
        "(float[n, 32] x) => (float[n, 8] y) { a = MatMul(x, u) v = Tanh(a) y = MatMul(v, w) }",
        {"u": noise(32, 32), "w": noise(32, 8)},
        {"awq"},
    ),
    "another reader": (
        "(float[n, 32] x) => (float[n, 8] y, float[n, 32] z) "
        "{ a = MatMul(x, u) v = Relu(a) y = MatMul(v, w) z = Neg(v) }",
        {"u": noise(32, 32), "w": noise(32, 8)},
        {"awq"},
    ),
    "an output between": (
        "(float[n, 32] x) => (float[n, 8] y, float[n, 32] v) { a = MatMul(x, u) v = Relu(a) y = MatMul(v, w) }",
        {"u": noise(32, 32), "w": noise(32, 8)},
        {"awq"},
    ),
    "shared weight": (
        "(float[n, 32] x) => (float[n, 32] y) { a = MatMul(x, u) v = Relu(a) y = MatMul(v, u) }",
        {"u": noise(32, 32)},
        set(),
    ),
}  # fmt: skip
EQUALIZERS = [name for name in catalog.names("kbitc.passes.equalize") if name != "bias_correction"]


def made(name: str) -> ir.Model:
    graph, weights, _ = CASES[name]
    return canonicalize(model(f"g {graph}", weights))


def feeds(subject: ir.Model, count: int = 4) -> list[dict[str, Array]]:
    """Inputs with a few channels far larger than the others."""
    found = []
    for index in range(count):
        feed = {}
        for value in subject.graph.inputs:
            dims = [dim if isinstance(dim, int) else 24 for dim in value.shape.dims] if value.shape else []
            array = noise(*dims, seed=index)
            axis = 1 if len(dims) == 4 else -1
            size = np.ones(dims[axis], np.float32)
            size[::7] = 12 if value.name == "x" and "Exp" not in {node.op_type for node in subject.graph} else 1
            feed[value.name or ""] = array * size.reshape(-1, *[1] * (len(dims) - 2 if axis == 1 else 0))
        found.append(feed)
    return found


def setting(subject: ir.Model, calibrated: bool = True) -> Setting:
    options = from_arguments(scheme="int3:b16", activations="float", target="reference")
    plan, kinds = driver.make_plan(subject, options, parse_target("reference"))
    return Setting(subject, plan, kinds, feeds(subject) if calibrated else ())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EQUALIZERS)
def test_the_float_model_computes_the_same(name: str, case: str) -> None:
    subject = made(case)
    before = [evaluate(subject, feed) for feed in feeds(subject)]
    names = set(subject.graph.initializers)
    changed = catalog.find("kbitc.passes.equalize", name, "equalizer").equalize(setting(subject))
    assert (changed > 0) == (name in CASES[case][2])
    edit.forget_names(subject)
    for feed, wanted in zip(feeds(subject), before, strict=True):
        # Sums of up to 432 products, one behind the other up to three times.
        assert_same(wanted, evaluate(subject, feed), terms=3 * 432)
    planned = {entry.tensor for entry in setting(subject, calibrated=False).plan.quantized()}
    assert planned <= names


@pytest.mark.parametrize("case", [name for name, item in CASES.items() if "cross_layer" in item[2]])
def test_cross_layer_makes_ranges_equal(case: str) -> None:
    subject = made(case)
    catalog.find("kbitc.passes.equalize", "cross_layer", "equalizer").equalize(setting(subject))
    contractions = [node for node in subject.graph if node.op_type in ("MatMul", "Conv")]
    for first, second in zip(contractions, contractions[1:], strict=False):
        np.testing.assert_allclose(output_peaks(first), input_peaks(second), rtol=0.1)


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_without_data_there_is_nothing_to_go_by(name: str) -> None:
    subject = made("layer norm")
    assert catalog.find("kbitc.passes.equalize", name, "equalizer").equalize(setting(subject, calibrated=False)) == 0
    with pytest.raises(UsageError, match="looks at activations.*--calibration"):
        base = setting(subject)
        solve_weights(subject, base.plan, base.kinds, Method("rtn", (name,)))


def test_awq_inserts_a_multiplication_only_where_it_pays() -> None:
    subject = made("nonlinearity between")
    catalog.find("kbitc.passes.equalize", "awq", "equalizer").equalize(setting(subject))
    inserted = [node for node in subject.graph if node.op_type == "Mul"]
    # x has channels far larger than others and is a graph input: it pays there; the results of Tanh are all alike.
    assert [node.inputs[0].name for node in inserted if node.inputs[0]] == ["x"]


def test_hadamard_matrices_are_orthogonal_and_their_own_inverse() -> None:
    for size in (16, 64):
        np.testing.assert_allclose(hadamard(size) @ hadamard(size), np.eye(size), atol=size * 2.0**-52)
    np.testing.assert_allclose(turn(turn(noise(3, 64), 16), 16), noise(3, 64), atol=16 * 2.0**-23)


@pytest.mark.parametrize("name", EQUALIZERS)
def test_a_solve_with_an_equalizer_leaves_the_float_model_alone(name: str) -> None:
    subject = made("layer norm")
    base = setting(subject)
    before = {key: np.array(edit.constant(value)) for key, value in subject.graph.initializers.items()}
    count = len(subject.graph)
    solved = solve_weights(subject, base.plan, base.kinds, Method("rtn", (name,)), base.feeds)
    assert len(subject.graph) == count
    for key, array in before.items():
        np.testing.assert_array_equal(edit.constant(subject.graph.initializers[key]), array)
    assert set(solved.tensors) == {"w", "u"}


def test_awq_and_smoothquant_lower_the_error_where_channels_differ() -> None:
    subject = made("layer norm")
    base = setting(subject)
    errors = {}
    for method in (Method("rtn"), Method("awq", ("awq",)), Method("rtn", ("awq",))):
        solved = solve_weights(subject, base.plan, base.kinds, method, base.feeds)
        quantized = Session(rewrite(solved.model, base.plan, solved.tensors, dict(base.kinds)))
        errors[str(method)] = sum(
            float(((quantized.run(feed)["y"] - evaluate(subject, feed)["y"]) ** 2).sum()) for feed in base.feeds
        )
    plain, both, scaled = errors.values()
    assert scaled < plain and both < plain
