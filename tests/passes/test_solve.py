"""Stage 6 on a small model: what it returns, what it leaves alone, what calibration wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import kbitc
from kbitc import driver
from kbitc.errors import UsageError
from kbitc.graph.evaluate import Session
from kbitc.options import Method, from_arguments
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import account, solve_weights
from kbitc.quant.plan import QuantPlan
from kbitc.targets.target import parse_target
from tests.support.onnx_text import Array, model, noise, proto

GRAPH = """g (float[n, 32] x) => (float[n, 8] y)
{ a = MatMul(x, w0)  b = Add(a, b0)  c = Relu(b)  d = MatMul(c, w1)  e = Relu(d)  y = MatMul(e, w2) }"""


def weights() -> dict[str, Array]:
    return {"w0": noise(32, 64), "b0": noise(64), "w1": noise(64, 48), "w2": noise(48, 8)}


def small() -> ir.Model:
    made = model(GRAPH, weights())
    for node in made.graph:
        node.name = f"node.{node.outputs[0].name}"
    return made


def feeds(count: int = 8, seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(8, 32))
    return [{"x": (rng.normal(size=(64, 8)) @ mix + 0.5).astype(np.float32)} for _ in range(count)]


def planned(made: ir.Model, scheme: str = "int3:b32") -> tuple[QuantPlan, dict[str, str]]:
    options = from_arguments(scheme=scheme, activations="float", target="reference")
    return driver.make_plan(made, options, parse_target("reference"))


def error(made: ir.Model, method: Method, calibrated: bool = True) -> float:
    """Mean squared error of y on inputs that were not calibrated with."""
    plan, kinds = planned(made)
    solved = solve_weights(made, plan, kinds, method, feeds() if calibrated else ())
    quantized = Session(rewrite(solved.model, plan, solved.tensors, kinds))
    reference = Session(made)
    return float(np.mean([(quantized.run(feed)["y"] - reference.run(feed)["y"]) ** 2 for feed in feeds(4, seed=1)]))


def test_calibrated_solvers_beat_round_to_nearest_on_other_inputs() -> None:
    made = small()
    plain = error(made, Method("rtn"), calibrated=False)
    corrected = error(made, Method("rtn", ("bias_correction",)))
    gptq = error(made, Method("gptq", ("bias_correction",)))
    assert gptq < corrected < plain


def test_sequential_calibration_sees_the_quantized_layers_before() -> None:
    made = small()
    plan, kinds = planned(made)
    at_once, one_by_one = (
        solve_weights(made, plan, kinds, Method("gptq", (), sequential), feeds()) for sequential in (False, True)
    )
    np.testing.assert_array_equal(at_once.tensors["w0"].codes, one_by_one.tensors["w0"].codes)
    assert (at_once.tensors["w2"].codes != one_by_one.tensors["w2"].codes).any()
    assert error(made, Method("gptq", ("bias_correction",), True)) < error(made, Method("rtn"), calibrated=False)


def test_the_float_model_stays_as_it_was() -> None:
    made = small()
    before = {name: value.const_value.numpy().copy() for name, value in made.graph.initializers.items()}  # type: ignore[union-attr]
    plan, kinds = planned(made)
    solved = solve_weights(made, plan, kinds, Method("gptq", ("bias_correction",)), feeds())
    assert {name: value.const_value.numpy().tolist() for name, value in made.graph.initializers.items()} == {  # type: ignore[union-attr]
        name: array.tolist() for name, array in before.items()
    }
    assert len(solved.model.graph) > len(made.graph) and list(solved.tensors) == ["w0", "w1", "w2"]


@pytest.mark.parametrize("sequential", [False, True])
def test_sums_that_were_never_negative_stay_so(sequential: bool) -> None:
    """A bank of filters over energies: what stands behind it takes a logarithm."""
    bank = np.where(noise(32, 8, seed=5) > 1, np.abs(noise(32, 8)), 0).astype(np.float32)
    made = model("g (float[n, 32] x) => (float[n, 8] y) { y = MatMul(x, bank) }", {"bank": bank})
    made.graph[0].name = "filters"
    energies = [{"x": np.square(feed["x"])} for feed in feeds()]
    plan, kinds = planned(made, "int4:c")
    solved = solve_weights(made, plan, kinds, Method("gptq", ("bias_correction",), sequential), energies)
    quantized = Session(rewrite(solved.model, plan, solved.tensors, kinds))
    silence = {"x": np.zeros((1, 32), np.float32)}
    assert all((quantized.run(feed)["y"] >= 0).all() for feed in [silence, *energies])


def test_the_account_says_what_the_solver_won() -> None:
    made = small()
    plan, kinds = planned(made)
    solved = solve_weights(made, plan, kinds, Method("gptq"), feeds())
    for item in account(solved, plan, kinds):
        found = item.as_json()
        assert found["solver"] == "gptq" and found["output_sqnr_db"] > found["rtn_output_sqnr_db"]
    free = account(solve_weights(made, plan, kinds, Method("rtn")), plan, kinds)
    assert all("output_sqnr_db" not in item.as_json() for item in free)


def test_a_module_with_negative_scales_keeps_its_meaning(tmp_path: Path) -> None:
    """The lowering is checked against the quantized ONNX when it is compiled; integer and float activations."""
    for activations in ("float", "dynamic"):
        out = tmp_path / f"{activations}.kbit"
        report = kbitc.compile(
            proto(GRAPH, weights()), out, bits=2, activations=activations, target="reference", calibration=feeds()
        )
        assert all(item.fit is not None and item.fit.solver == "gptq" for item in report.weights)


@pytest.mark.parametrize("option", ["solver", "equalize"])
def test_unknown_names_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {option.replace('equalize', 'equalizer')}"):
        from_arguments(**{option: "magic"})


def test_the_defaults_depend_on_calibration() -> None:
    options = from_arguments(bits=4)
    assert options.method(True) == Method("gptq", ("bias_correction",), sequential=True)
    assert from_arguments(bits=8).method(True) == Method("gptq", ("bias_correction",))
    assert from_arguments(bits=4, sequential=False).method(True) == Method("gptq", ("bias_correction",))
    assert options.method(False) == Method("rtn")
    assert from_arguments(bits=4, solver="mse_clip", equalize="none").method(True) == Method("mse_clip")
