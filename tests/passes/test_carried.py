"""Already quantized models: their ranges and levels become the static plan; one operator is off by one step at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

import kbitc
from kbitc import driver, options
from kbitc.errors import UsageError
from kbitc.graph import legality
from kbitc.graph.evaluate import evaluate
from kbitc.graph.text import operator_counts
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.options import Method
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.carried import Carried, read_carried
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import account, solve_weights
from kbitc.passes.verify import accuracy
from kbitc.quant.plan import QuantPlan
from kbitc.static import plan_static
from kbitc.targets.target import parse_target
from tests.support.onnx_text import noise, proto

Array = npt.NDArray[Any]
IMAGE = "float[2, 4, 9, 7] x"
#: Steps of the input, behind the first convolution and of the result: no simple ratios, so that ties are rare.
IN, MID, OUT = 0.0301, 0.021377, 0.050131


def ints(dtype: type[np.generic], *shape: int, seed: int = 0, spread: int = 127) -> Array:
    return np.random.default_rng([seed, *shape]).integers(-spread, spread + 1, shape).astype(dtype)


def weights(kind: str) -> dict[str, Array]:
    """Scales and zero points of uint8 ("u8"), int8 ("s8") or symmetric int8 ("sym") activations, and two layers."""
    dtype = np.uint8 if kind == "u8" else np.int8
    zeros = {"u8": (120, 7, 130), "s8": (-3, -121, 5), "sym": (0, 0, 0)}[kind]
    found: dict[str, Array] = {
        "w": ints(np.int8, 6, 4, 3, 3), "ws": np.linspace(0.002, 0.01, 6, dtype=np.float32),
        "v": ints(np.int8, 5, 6, 1, 1, seed=1), "vs": np.array(0.01, np.float32),
        "b": ints(np.int32, 6, seed=2, spread=5000),
        "bs": np.float32(IN) * np.linspace(0.002, 0.01, 6, dtype=np.float32),
    }  # fmt: skip
    for name, step, zero in zip("xmy", (IN, MID, OUT), zeros, strict=True):
        found |= {f"{name}s": np.array(step, np.float32), f"{name}z": np.array(zero, dtype)}
    return found


def rounded(value: str, name: str, new: str) -> str:
    """`new` is `value` through the codes of `name`."""
    return f"{new}_q = QuantizeLinear({value}, {name}s, {name}z) {new} = DequantizeLinear({new}_q, {name}s, {name}z) "


HEAD = (
    rounded("x", "x", "xr") + "wf = DequantizeLinear<axis = 0>(w, ws) bf = DequantizeLinear<axis = 0>(b, bs) "
    "c = Conv<pads = [1, 1, 1, 1]>(xr, wf, bf) "
)
TAIL = "vf = DequantizeLinear(v, vs) d = Conv(r, vf) " + rounded("d", "y", "y")
#: What happens between two convolutions, as quantizers write it; `r` is read by the second.
MIDDLES = {
    "nothing": rounded("c", "m", "r"),
    "relu": "a = Relu(c) " + rounded("a", "m", "r"),
    "rounded before relu": rounded("c", "m", "a") + "e = Relu(a) " + rounded("e", "m", "r"),
    "function": rounded("c", "m", "a") + "e = HardSigmoid(a) " + rounded("e", "x", "r"),
    "function of relu": "u = Relu(c) " + rounded("u", "m", "a") + "e = HardSigmoid(a) " + rounded("e", "x", "r"),
    "meeting point": rounded("c", "m", "a") + "s = Sigmoid(a) " + rounded("s", "x", "t") + "e = Mul(a, t) "
    + rounded("e", "m", "r"),
    "sum": rounded("c", "m", "a") + "e = Add(a, a2) " + rounded("e", "y", "r"),
    "max pool": rounded("c", "m", "a") + "e = MaxPool<kernel_shape = [3, 3]>(a) " + rounded("e", "m", "r"),
    "other steps behind a pool": rounded("c", "m", "a") + "e = MaxPool<kernel_shape = [3, 3]>(a) "
    + rounded("e", "y", "r"),
    "moved first": "e = Transpose<perm = [0, 1, 3, 2]>(c) " + rounded("e", "m", "r"),
    "concat": rounded("c", "m", "a") + rounded("c", "y", "f") + "e = Concat<axis = 2>(a, f) " + rounded("e", "y", "r"),
    "mean": rounded("c", "m", "a") + "e = GlobalAveragePool(a) " + rounded("e", "m", "r"),
    "constant": rounded("c", "m", "a") + "kf = DequantizeLinear(k, xs, xz) e = Mul(a, kf) " + rounded("e", "m", "r"),
    "moved codes": "c_q = QuantizeLinear(c, ms, mz) e = MaxPool<kernel_shape = [3, 3]>(c_q) "
    "r = DequantizeLinear(e, ms, mz) ",
    "twice": rounded("c", "m", "a") + rounded("a", "y", "r"),
}  # fmt: skip


def graph(middle: str, kind: str, outputs: str = "float[] y") -> onnx.ModelProto:
    held = weights(kind) | {"k": np.array(1 if kind == "u8" else 9, weights(kind)["xz"].dtype)}
    text = MIDDLES[middle]
    if "a2" in text:
        text = text.replace("e = Add", "g = Conv<pads = [1, 1, 1, 1]>(xr, wf) " + rounded("g", "y", "a2") + "e = Add")
    if "k" not in text.split("(k,")[0] and "(k," not in text:
        del held["k"]
    return proto(f"g ({IMAGE}) => ({outputs}) {{ {HEAD} {text} {TAIL} }}", held)


def carried_of(message: onnx.ModelProto) -> tuple[ir.Model, Carried]:
    model = canonicalize(load_model(message))
    found = read_carried(model)
    assert found is not None
    return model, found


class Samples:
    def __init__(self, carried: Carried, calibration: Any = None) -> None:
        self.original, self.carried, self.calibration = carried.model, carried, calibration


def integers(message: onnx.ModelProto, calibration: Any = None) -> tuple[ir.Model, ir.Model, QuantPlan]:
    """(canonical model, integer model, plan)."""
    model, carried = carried_of(message)
    wishes = options.from_arguments(activations="static")
    plan, kinds = driver.make_plan(carried.model, wishes, parse_target("reference"), carried.tensors)
    solved = solve_weights(carried.model, plan, kinds, Method("rtn"), carried=carried.tensors)
    plan, _ = plan_static(Samples(carried, calibration), plan, solved.tensors, account(solved, plan, kinds), wishes)
    made = rewrite(carried.model, plan, solved.tensors, kinds)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert legality.after_rewrite(made) == []
    return model, made, plan


@pytest.mark.parametrize("kind", ["u8", "s8", "sym"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_operators_between_codes_run_on_integers_with_the_models_own_steps(middle: str, kind: str) -> None:
    model, made, plan = integers(graph(middle, kind))
    assert plan.static is not None
    reasons = [(entry.op_type, entry.reason) for entry in plan.static.nodes if entry.form != "integer"]
    assert [op_type for op_type, _ in reasons] in (["Identity"], ["Identity"] * 3), reasons
    counts = operator_counts(made)
    assert "Conv" not in counts and counts["ConvInteger"] >= 2
    assert plan.static.observer == "the model's own"
    for feeds in (made_up_feeds(model), {"x": 3 * made_up_feeds(model, seed=1)["x"]}):
        wanted, found = (evaluate(each, feeds)["y"] for each in (model, made))
        # Ties go up here and to even there, in each of at most four roundings; a step of the middle is worth at
        # most |v| summed over its inputs, in steps of the result.
        worth = np.abs(weights(kind)["v"]).sum(axis=1).max() * 0.01 * max(MID, IN, OUT) / OUT
        steps = np.abs(wanted - found) / np.float32(OUT)
        assert steps.max() <= 1 + 4 * worth
        assert (steps > 0.5).mean() < 0.01


def test_one_operator_is_one_step_off_at_most_and_only_at_ties() -> None:
    header = f"g ({IMAGE}) => (float[] r) {{ {HEAD} {MIDDLES['nothing']} }}"
    held = {name: array for name, array in weights("u8").items() if name[0] in "xmwb"}
    model, made, _ = integers(proto(header, held))
    feeds = made_up_feeds(model)
    wanted, found = (evaluate(each, feeds)["r"] for each in (model, made))
    off = np.abs(wanted - found) > MID / 2
    assert np.abs(wanted - found).max() <= MID * 1.001
    sums = evaluate(model, feeds, ["c"])["c"] / np.float32(MID)
    # float32 sums of 36 products, then one division: 2^-24 each, relative to what is summed.
    reach = np.abs(held["w"]).sum(axis=(1, 2, 3)).max() * 0.01 * 255 * IN / MID
    assert (np.abs(sums[off] - np.floor(sums[off]) - 0.5) <= 38 * 2.0**-24 * reach).all()


def test_levels_and_biases_are_kept_as_they_are() -> None:
    _, made, plan = integers(graph("relu", "u8"))
    held = {name: value.const_value.numpy() for name, value in made.graph.initializers.items() if value.const_value}
    assert any(np.array_equal(array, weights("u8")["w"]) for array in held.values() if array.dtype == np.int8)
    assert any(
        np.array_equal(array.reshape(-1), weights("u8")["b"]) for array in held.values() if array.dtype == np.int32
    )
    assert {entry.reason for entry in plan.entries} == {"the model's own levels"}


def test_unsigned_weights_become_signed_where_they_fit() -> None:
    message = graph("relu", "u8")
    for tensor in message.graph.initializer:
        if tensor.name == "v":
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((weights("u8")["v"].astype(np.int16) + 128).astype(np.uint8), "v")
            )
    message.graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "vz"))
    node = next(node for node in message.graph.node if node.input[0] == "v")
    node.input.append("vz")
    _, made, _ = integers(message)
    held = [value.const_value.numpy() for value in made.graph.initializers.values() if value.const_value]
    assert any(np.array_equal(array, weights("u8")["v"]) for array in held if array.dtype == np.int8)


@pytest.mark.parametrize("kind", ["u8", "s8"])
def test_a_table_of_codes_is_gathered_as_it_is_stored(kind: str) -> None:
    """Its levels, up to 255 - 83, fit no int8. To dequantize it all for a few rows would cost more than the run."""
    dtype = np.uint8 if kind == "u8" else np.int8
    table = np.random.default_rng(0).integers(0, 256, (40, 8)) - (0 if kind == "u8" else 128)
    held = {name: array for name, array in weights(kind).items() if name[0] in "my"} | {
        "t": table.astype(dtype), "mz": np.array(83 if kind == "u8" else -45, dtype), "v": ints(np.int8, 8, 6, seed=1),
        "vs": np.array(0.01, np.float32),
    }  # fmt: skip
    rows = "tf = DequantizeLinear(t, ms, mz) e = Gather(tf, i) " + rounded("e", "m", "r")
    text = f"{rows} vf = DequantizeLinear(v, vs) d = MatMul(r, vf) {rounded('d', 'y', 'y')}"
    model, made, _ = integers(proto(f"g (int64[5] i) => (float[] y) {{ {text} }}", held))
    counts = operator_counts(made)
    assert "QuantizeLinear" not in counts and counts["DequantizeLinear"] == 1
    feeds = {"i": np.array([0, 39, 7, 7, 12])}
    wanted, found = (evaluate(each, feeds)["y"] for each in (model, made))
    assert np.abs(wanted - found).max() <= OUT * 1.001


def test_weights_that_a_file_quantizes_when_it_runs_are_levels_too() -> None:
    held = weights("s8") | {"wf0": noise(6, 4, 3, 3) / 4, "wz": np.zeros(6, np.int8)}
    text = HEAD.replace("(w, ws)", "(w_q, ws, wz)").replace("wf =", "w_q = QuantizeLinear<axis = 0>(wf0, ws, wz) wf =")
    del held["w"]
    _, made, plan = integers(proto(f"g ({IMAGE}) => (float[] y) {{ {text} {MIDDLES['relu']} {TAIL} }}", held))
    assert len(plan.quantized()) == 2 and operator_counts(made)["QuantizeLinear"] == 1


def test_a_model_whose_inputs_and_outputs_are_codes() -> None:
    held = weights("s8")
    text = HEAD.split("xr = ")[1].join(["xr = ", ""]).replace("xr_q", "x")
    tail = TAIL.replace(rounded("d", "y", "y"), "y = QuantizeLinear(d, ys, yz)")
    message = proto(f"g (int8[2, 4, 9, 7] x) => (int8[] y) {{ {text} {MIDDLES['relu']} {tail} }}", held)
    model, made, _ = integers(message)
    feeds = {"x": ints(np.int8, 2, 4, 9, 7, seed=9)}
    wanted, found = (evaluate(each, feeds)["y"].astype(np.int32) for each in (model, made))
    assert np.abs(wanted - found).max() <= 1 and (wanted != found).mean() < 0.01
    assert "Conv" not in operator_counts(made)


def test_float_operators_between_codes_read_and_give_rounded_numbers() -> None:
    held = weights("u8")
    middle = rounded("c", "m", "a") + "s = Softmax<axis = 1>(a) " + rounded("s", "x", "r")
    message = proto(f"g ({IMAGE}) => (float[] y, float[] r, float[] a) {{ {HEAD} {middle} {TAIL} }}", held)
    model, made, _ = integers(message)
    counts = operator_counts(made)
    assert counts["ConvInteger"] == 2 and counts["Softmax"] == 1
    feeds = made_up_feeds(model)
    wanted, found = evaluate(model, feeds), evaluate(made, feeds)
    for name, step in (("r", IN), ("a", MID)):
        assert np.abs(wanted[name] - found[name]).max() <= 1.001 * step
        assert np.abs(found[name] / step - np.rint(found[name] / step)).max() < 1e-3


def test_what_has_no_range_stays_float_without_calibration_and_not_with_it() -> None:
    held = weights("u8") | {"u": noise(6, 6, 1, 1)}
    middle = rounded("c", "m", "a") + "e = Conv(a, u) r = Relu(e) "
    message = proto(f"g ({IMAGE}) => (float[] y) {{ {HEAD} {middle} {TAIL} }}", held)
    _, made, plan = integers(message)
    assert plan.static is not None
    assert any("carries no range of r" in entry.reason for entry in plan.static.nodes)
    assert operator_counts(made)["ConvInteger"] == 2
    model, made, _ = integers(message, calibration=[made_up_feeds(canonicalize(load_model(message)))])
    assert operator_counts(made)["ConvInteger"] == 3


def test_models_without_ranges_of_activations_carry_none() -> None:
    held = {"w": ints(np.int8, 6, 4, 3, 3), "ws": np.array(0.01, np.float32)}
    model = canonicalize(
        load_model(proto(f"g ({IMAGE}) => (float[] y) {{ f = DequantizeLinear(w, ws) y = Conv(x, f) }}", held))
    )
    assert read_carried(model) is None
    wide = weights("u8") | {name: np.array(1000, np.uint16) for name in ("xz", "mz", "yz")}
    assert read_carried(canonicalize(load_model(proto(str_graph(), wide)))) is None


def str_graph() -> str:
    return f"g ({IMAGE}) => (float[] y) {{ {HEAD} {MIDDLES['relu']} {TAIL} }}"


@pytest.mark.parametrize("step", [1e-30, 1e30])
def test_steps_that_no_fixed_point_factor_spans_stay_float(step: float) -> None:
    model, made, _ = integers(proto(str_graph(), weights("u8") | {"ms": np.array(step, np.float32)}))
    feeds = made_up_feeds(model)
    np.testing.assert_allclose(evaluate(made, feeds)["y"], evaluate(model, feeds)["y"], atol=OUT * 1.001)


def test_compile_takes_the_models_own_ranges_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph("relu", "u8"), path)
    own = kbitc.compile(path, tmp_path / "own.kbit")
    named = kbitc.compile(path, tmp_path / "named.kbit", activations="static")
    plain = kbitc.compile(path, tmp_path / "plain.kbit", activations="float")
    assert {item.entry.reason for item in own.weights + named.weights} == {"the model's own levels"}
    assert not plain.weights
    feeds = made_up_feeds(load_model(path))
    outputs = [kbitc.load(tmp_path / f"{name}.kbit")(feeds)["y"] for name in ("own", "named", "plain")]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() <= 2.001 * OUT


def test_static_without_ranges_still_asks_for_samples(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(proto(f"g ({IMAGE}) => (float[] y) {{ y = Conv(x, w) }}", {"w": noise(6, 4, 3, 3)}), path)
    with pytest.raises(UsageError, match="needs samples"):
        kbitc.compile(path, tmp_path / "model.kbit", activations="static")


def test_the_rounding_of_a_quantized_model_is_noise_that_its_module_may_draw_anew() -> None:
    model = canonicalize(load_model(graph("sum", "u8")))
    feeds = [made_up_feeds(model)]
    measured = accuracy.measure(accuracy.reference_runs(model, model, feeds, "made up"), None)
    assert 20 < measured.rounding["y"].sqnr_db < 50
    assert measured.quantized["y"].sqnr_db > 100
