"""Plans from a person: what they name is done, what they get wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.errors import UnsupportedError, UsageError
from kbitc.passes.allocate.given import apply_requests
from kbitc.passes.allocate.survey import survey
from kbitc.passes.allocate.uniform import keep_float
from kbitc.quant.plan import QuantPlan, read_plan
from kbitc.targets.target import parse_target
from tests.support.planned import model


def _plan(tmp_path: Path, *entries: dict[str, Any], made: ir.Model | None = None, **chosen: Any) -> QuantPlan:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 1, "tensors": entries}))
    return driver.make_plan(made or model(), options.from_arguments(plan=path, **chosen), parse_target("x86:avx2"))[0]


def _schemes(plan: QuantPlan) -> dict[str, str | None]:
    return {entry.tensor: None if entry.scheme is None else str(entry.scheme) for entry in plan.entries}


def test_named_weights_follow_the_plan_and_the_others_the_options(tmp_path: Path) -> None:
    plan = _plan(tmp_path, {"tensor": "first", "scheme": "nf3:b64"}, {"tensor": "table", "scheme": "float32"}, bits=5)
    found = _schemes(plan)
    assert (found["first"], found["table"], found["second"]) == ("nf3:b64", None, "int5:b32")
    assert next(entry for entry in plan.entries if entry.tensor == "first").reason == "from the plan"


def test_a_plan_alone_over_a_float_build(tmp_path: Path) -> None:
    found = _schemes(_plan(tmp_path, {"tensor": "first", "scheme": "int4:b32"}, scheme="float32"))
    assert {name for name, scheme in found.items() if scheme} == {"first"}


def test_a_written_plan_given_back_makes_the_same_decisions(tmp_path: Path) -> None:
    before = _plan(tmp_path, bits=3)
    before.write(tmp_path / "written.json")
    again = options.from_arguments(plan=tmp_path / "written.json", bits=8)
    after = driver.make_plan(model(), again, parse_target("x86:avx2"))[0]
    assert [(item.tensor, item.scheme, item.activation) for item in after.entries] == [
        (item.tensor, item.scheme, item.activation) for item in before.entries
    ]


def test_an_activation_in_the_plan_is_kept(tmp_path: Path) -> None:
    plan = _plan(tmp_path, {"tensor": "first", "scheme": "int4:b32", "activation": "float32"})
    found = {entry.tensor: entry.activation for entry in plan.entries}
    assert (found["first"], found["second"]) == ("float32", "int8")


def test_an_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'frist'.*did you mean first") as caught:
        _plan(tmp_path, {"tensor": "frist", "scheme": "int4:b32"})
    assert caught.value.exit_code == 2


def test_activations_that_cannot_be_had_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="int8 activations.*'deep'.*grouped convolution") as caught:
        _plan(tmp_path, {"tensor": "deep", "scheme": "int4:c", "activation": "int8"})
    assert caught.value.exit_code == 4


def test_a_scheme_that_the_target_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 1, "tensors": [{"tensor": "first", "scheme": "int4:b32"}]}))
    made = model()
    candidates = survey(made)
    refuse = "no kernel for it"
    with pytest.raises(UnsupportedError, match="'first'.*int4:b32.*no kernel for it") as caught:
        apply_requests(made, candidates, keep_float(candidates), read_plan(path), "int8", {}, lambda *_: refuse)
    assert caught.value.exit_code == 4


def test_a_weight_that_cannot_be_quantized_says_why(tmp_path: Path) -> None:
    made = model()
    next(node for node in made.graph if node.op_type == "Gather").attributes["axis"] = ir.AttrInt64("axis", 1)
    with pytest.raises(UnsupportedError, match="'table'.*gathers along another axis"):
        _plan(tmp_path, {"tensor": "table", "scheme": "int4:b32"}, made=made)
    assert _schemes(_plan(tmp_path, {"tensor": "table", "scheme": None}, made=made))["table"] is None


def test_a_plan_for_another_model_is_noticed_by_its_shapes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"another model.*\(33, 1, 41\).*\(33, 1, 40\)"):
        _plan(tmp_path, {"tensor": "first", "scheme": "int4:b32", "shape": [33, 1, 41]})


def test_a_plan_and_an_exclude_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--exclude keeps float.*'fir"):
        _plan(tmp_path, {"tensor": "first", "scheme": "int4:b32"}, exclude=["fir*"])
    assert _schemes(_plan(tmp_path, {"tensor": "first", "scheme": None}, exclude=["fir*"]))["first"] is None
