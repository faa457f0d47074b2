"""Weights whose layers are slower than float stay float, and the written plan says it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kbitc import never_slower
from kbitc.bundle.profile import LayerTimes
from kbitc.cli import _guarded
from kbitc.never_slower import judge
from kbitc.quant.plan import FLOAT, INT8, PlanEntry, QuantPlan
from kbitc.quant.scheme import QuantScheme

BODY = """g (float[1, 64] x) => (float[1, 32] y) {
    p = MatMul(x, first)
    y = MatMul(p, second)
}"""


def _entry(tensor: str, *nodes: str, scheme: str | None = "int4:b32") -> PlanEntry:
    parsed = None if scheme is None else QuantScheme.parse(scheme)
    return PlanEntry(tensor, nodes, "MatMul", (32, 1, 64), parsed, FLOAT if scheme is None else INT8, "asked for")


def _layer(name: str, *seconds: float) -> LayerTimes:
    return LayerTimes(name, "r", True, list(seconds))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(3)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {BODY}')
    for name, shape in (("first", (64, 48)), ("second", (48, 32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name))
    path = tmp_path_factory.mktemp("never") / "model.onnx"
    onnx.save(proto, path)
    return path


def test_the_times_of_all_layers_of_a_weight_are_added() -> None:
    plan = QuantPlan((_entry("shared", "a", "b"), _entry("single", "c"), _entry("float", "d", scheme=None)))
    quantized = [_layer("a", 1.0, 1.0), _layer("b.channels_last", 4.0, 4.0), _layer("c", 1.0, 1.0)]
    floats = [_layer("a", 2.0, 2.0), _layer("b.channels_last", 2.0, 2.0), _layer("c", 1.5, 1.5), _layer("d", 1.0, 1.0)]
    found = judge(plan, quantized, floats, measured=True)
    assert [(item.entry.tensor, item.seconds, item.float_seconds, item.slower) for item in found] == [
        ("shared", 5.0, 4.0, True), ("single", 1.0, 1.5, False),
    ]  # fmt: skip


def test_a_layer_that_only_one_build_has_is_not_judged() -> None:
    plan = QuantPlan((_entry("table", "gather"), _entry("shared", "a", "b")))
    quantized = [_layer("gather", 9.0), _layer("a", 9.0), _layer("b", 9.0)]
    assert judge(plan, quantized, [_layer("a", 1.0)], measured=True) == ()


def test_slower_weights_stay_float_and_the_plan_replays_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(models: dict[str, Any], rounds: int, clock: Any) -> dict[str, list[LayerTimes]]:
        names = [layer["name"] for layer in models["float"][2]["layers"]]
        return {
            "quantized": [_layer(names[0], 3.0, 3.0), _layer(names[1], 1.0, 1.0)],
            "float": [_layer(name, 2.0, 2.0) for name in names],
        }

    monkeypatch.setattr(never_slower, "profile", fake)
    plan, replayed = tmp_path / "plan.json", tmp_path / "replayed.json"
    given = ["compile", str(model), "--bits", "4", "-o"]
    assert _guarded([*given, str(tmp_path / "a.kbit"), "--never-slower", "--write-plan", str(plan)]) == 0
    report = json.loads((tmp_path / "a.kbit" / "report.json").read_text())
    first, second = report["weights"]
    assert (first["scheme"], second["scheme"]) == (None, "int4:b32")
    assert first["reason"] == "slower than float: 3000000.0 us as int4:b32, 2000000.0 us as float, measured"
    assert [item["kept_float"] for item in report["compared"]] == [True, False]
    assert report["compared"][0]["float_microseconds"] == 2e6

    def unasked(*arguments: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(never_slower, "profile", unasked)
    again = tmp_path / "b.kbit"
    assert _guarded([*given, str(again), "--plan", str(plan), "--write-plan", str(replayed)]) == 0
    schemes = [[item["scheme"] for item in json.loads(path.read_text())["tensors"]] for path in (plan, replayed)]
    assert schemes[0] == schemes[1] == [None, "int4:b32"]
    assert (again / "module.so").read_bytes() == (tmp_path / "a.kbit" / "module.so").read_bytes()


def test_real_times_decide(model: Path, tmp_path: Path) -> None:
    """Whatever is measured: a weight is float exactly when its layer was found slower."""
    assert _guarded(["compile", str(model), "-o", str(tmp_path / "a.kbit"), "--never-slower"]) == 0
    report = json.loads((tmp_path / "a.kbit" / "report.json").read_text())
    kept = {item["tensor"]: item["kept_float"] for item in report["compared"]}
    assert kept == {item["tensor"]: item["scheme"] is None for item in report["weights"]} and len(kept) == 2


def test_for_another_machine_the_cost_model_decides(model: Path, tmp_path: Path) -> None:
    given = ["compile", str(model), "-o", str(tmp_path / "a.kbit"), "--never-slower", "--target", "arm-neon"]
    assert _guarded(given) == 0
    report = json.loads((tmp_path / "a.kbit" / "report.json").read_text())
    assert [item["measured"] for item in report["compared"]] == [False, False]
    kept = {item["tensor"]: item["kept_float"] for item in report["compared"]}
    assert kept == {item["tensor"]: item["scheme"] is None for item in report["weights"]}


@pytest.mark.parametrize("other", [["--scheme", "float32"], ["--integer-only"]])
def test_where_nothing_can_be_chosen_it_is_refused(
    model: Path, other: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _guarded(["compile", str(model), "-o", str(tmp_path / "a.kbit"), "--never-slower", *other]) == 2
    assert "nothing to choose" in capsys.readouterr().err
