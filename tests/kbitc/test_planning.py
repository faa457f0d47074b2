"""Plans, budgets and formats on the command line: exit codes, one line, nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc.cli import _guarded
from tests.support import planned


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(ir.to_proto(planned.model()), path)
    return path


def _run(*arguments: object) -> int:
    return _guarded([str(item) for item in arguments])


def _plan(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": 1, "tensors": entries}))
    return path


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ({"tensor": "frist", "scheme": "int4:b32"}, 2, "did you mean first"),
        ({"tensor": "first", "scheme": "imt4:b32"}, 2, "did you mean int"),
        ({"tensor": "table", "scheme": "int4:b32", "activation": "int8"}, 4, "activations that cannot be had"),
    ],
)
def test_a_wrong_plan_is_one_line_and_leaves_nothing(
    entry: dict[str, Any], code: int, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(tmp_path / "plan.json", entry)
    assert _run("quantize", model, "-o", tmp_path / "q.onnx", "--plan", plan) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_inspect_writes_a_plan_that_inspect_shows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("inspect", model, "--write-plan", tmp_path / "plan.json") == 0
    data = json.loads((tmp_path / "plan.json").read_text())
    for entry in data["tensors"]:
        entry["scheme"] = "int3:b64" if entry["tensor"] == "first" else "float32"
        entry.pop("activation")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert _run("inspect", model, "--plan", tmp_path / "plan.json", "--json") == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert {item["tensor"]: item["scheme"] for item in weights if item["scheme"]} == {"first": "int3:b64"}


def test_a_size_budget_of_an_onnx_file_is_kept_or_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for budget in (9_000, 10_500, 100_000):
        out = tmp_path / f"{budget}.onnx"
        assert _run("quantize", model, "-o", out, "--size-budget", budget, "--json") == 0, capsys.readouterr().err
        sizes.append(out.stat().st_size)
        assert out.stat().st_size <= budget
    assert sizes == sorted(sizes)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert _run("quantize", model, "-o", tmp_path / "no.onnx", "--size-budget", 2_000) == 2
    assert "below the smallest result" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_bits_a_weight_are_kept_and_the_report_says_how(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "q.onnx", tmp_path / "plan.json"
    assert _run("quantize", model, "-o", out, "--target-bpw", 4.4, "--write-plan", plan, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits_per_weight"] <= 4.4 and report["planning"]["allocator"] == "sensitivity"
    assert len({entry["scheme"] for entry in json.loads(plan.read_text())["tensors"]}) > 1


def test_a_time_budget_is_predicted_and_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ("--target", "x86:avx512vnni")
    assert _run("quantize", model, "-o", tmp_path / "all.onnx", "--time-budget", "1s", *target, "--json") == 0
    free = json.loads(capsys.readouterr().out)["planning"]["predicted_microseconds"]
    asked = 0.9 * free
    assert _run("quantize", model, "-o", tmp_path / "q.onnx", "--time-budget", f"{asked:.3f}us", *target) == 0
    said = capsys.readouterr().out
    found = re.search(r"predicted to take ([\d.]+) us of ([\d.]+)", said)
    assert found is not None and 0 < float(found[1]) <= asked + 0.005
    assert _run("quantize", model, "-o", tmp_path / "no.onnx", "--time-budget", "0.001us", *target) == 2
    assert "quickest plan" in capsys.readouterr().err and not (tmp_path / "no.onnx").exists()


def test_a_score_that_nothing_keeps_is_exit_6_with_its_interval(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = tmp_path / "metric.py"
    metric.write_text("def score(outputs, labels):\n    return -abs(outputs['y'] - labels).mean(axis=(1, 2, 3))\n")
    samples = planned.feeds()[0]
    np.savez(tmp_path / "data.npz", **samples)
    np.save(tmp_path / "labels.npy", np.zeros((2, 20, 6, 6), np.float32))
    arguments = ["--calibration", tmp_path / "data.npz", "--labels", tmp_path / "labels.npy", "--metric", metric]
    code = _run("quantize", model, "-o", tmp_path / "q.onnx", "--max-drop", "0%", "--metric", "sqnr")
    error = capsys.readouterr().err
    assert code == 6 and "no plan keeps --max-drop" in error and "95 % interval" in error
    assert _run("quantize", model, "-o", tmp_path / "q.onnx", "--max-drop", "100%", *arguments) == 0
    assert "metric falls" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
def test_other_formats_are_written_or_refused(
    form: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.onnx"
    assert _run("quantize", model, "-o", out, "--format", form, "--bits", 3) == 4
    assert "--widen" in capsys.readouterr().err and not out.exists()
    assert _run("quantize", model, "-o", out, "--format", form, "--bits", 3, "--widen") == 0
    onnx.checker.check_model(onnx.load(out))


def test_a_folder_of_compressed_tensors_replaces_only_its_like(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", model, "-o", out, "--format", "compressed-tensors", "--scheme", "int4:c"]
    assert _run(*arguments) == 0
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert _run(*arguments) == 2 and _run(*arguments, "--force") == 0
    (out / "config.json").unlink()
    (out / "precious").write_text("kept")
    capsys.readouterr()
    assert _run(*arguments, "--force") == 2
    assert "not replaced" in capsys.readouterr().err and (out / "precious").read_text() == "kept"


def test_a_format_that_does_not_exist_names_the_nearest(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("quantize", model, "-o", tmp_path / "q", "--format", "matmul-nbits") == 2
    assert "did you mean" in capsys.readouterr().err
