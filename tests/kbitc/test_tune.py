"""`kbitc tune` from a bundle to a database to a bundle that records it, with the same outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kbitc.bundle.manifest import ValueInfo
from kbitc.bundle.runtime import load
from kbitc.cli import _guarded
from kbitc.commands.tune import check_tunable, sizes_of
from kbitc.errors import UsageError
from kbitc.targets import tune
from kbitc.targets.target import host_runs, parse_target, parse_targets

BODY = "g (float[batch, 64] x) => (float[batch, 80] y) { y = MatMul(x, first) }"


def saved_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of the model; the cache is a folder of its own, and no measurement depends on the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(tune, "timed", _second_is_twice_as_fast)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {BODY}')
    weight = np.random.default_rng(3).normal(size=(64, 80)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "first"))
    onnx.save(proto, folder / "model.onnx")
    return str(folder / "model.onnx")


def test_what_is_faster_is_compiled_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_model(tmp_path, monkeypatch)
    usual, tuned = (str(tmp_path / name) for name in ("usual.kbit", "tuned.kbit"))
    assert _guarded(["compile", model, "-o", usual, "--tuned", "none"]) == 0
    assert _guarded(["tune", usual, "--shape", "x=40x64"]) == 0
    (entry,) = json.loads((tmp_path / "cache" / "kbitc" / "tuned.json").read_text())["entries"]
    assert (entry["rule"], entry["shape"], entry["speed"]) == ("integer_product", "int4:b32, any rows, 80x1x64", 2.0)
    assert _guarded(["compile", model, "-o", tuned]) == 0
    (layer,) = json.loads(Path(tuned, "report.json").read_text())["layers"]
    assert layer["schedule"] == entry["schedule"]
    recorded = [json.loads(Path(path, "manifest.json").read_text())["provenance"]["tuning"] for path in (usual, tuned)]
    assert recorded[0] is None and recorded[1]["schedules"] >= 1
    assert Path(usual, "module.so").read_bytes() != Path(tuned, "module.so").read_bytes()
    for rows in (1, 3, 17, 40):
        feeds = {"x": np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)}
        np.testing.assert_array_equal(load(usual)(feeds)["y"], load(tuned)(feeds)["y"])


def test_of_several_variants_the_one_that_the_report_tells_of_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = parse_targets("x86")[-1]
    if reason := host_runs(best):
        pytest.skip(reason)
    model, bundle = saved_model(tmp_path, monkeypatch), str(tmp_path / "a.kbit")
    assert _guarded(["compile", model, "-o", bundle, "--target", "x86", "--tuned", "none"]) == 0
    assert _guarded(["tune", bundle, "--shape", "x=40x64"]) == 0
    (entry,) = json.loads((tmp_path / "cache" / "kbitc" / "tuned.json").read_text())["entries"]
    assert entry["target"] == best.name


def _second_is_twice_as_fast(trials: Sequence[Any], target: Any) -> dict[str, list[float]]:
    return {trial.name: [1.0 if trial.name in ("s1", tune.FOUND) else 2.0] for trial in trials}


def test_sizes_come_from_shapes_of_inputs() -> None:
    inputs = [ValueInfo("x", "float32", ("batch", 64, "width")), ValueInfo("m", "int64", ("batch",))]
    assert sizes_of(inputs, ["x=2x64x9"]) == {"batch": 2, "width": 9}
    with pytest.raises(UsageError, match="has no size"):
        sizes_of(inputs, ["m=2"])
    with pytest.raises(UsageError, match="of no input"):
        sizes_of(inputs, ["z=2"])


def test_another_machine_is_not_tuned_here() -> None:
    with pytest.raises(UsageError, match="on the machine itself"):
        check_tunable(parse_target("cuda:sm_90"), "a.kbit")
