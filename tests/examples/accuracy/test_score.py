from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import confidence
import numpy as np
import onnx
import pytest
import score
import tables
from onnx import helper, numpy_helper
from tasks import Task, percent

from kbitc.errors import UnsupportedError

ROWS = {
    score.REFERENCE: None,
    "W8": {"bits": 8, "activations": "float"},
    "newer": {"bits": 4, "flux": 3},
    "wrong": {"bits": 9},
}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Sign of the sum of 32 numbers, by a matrix of ones."""
    weight = numpy_helper.from_array(np.ones((32, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", 1, ["N", 32])],
        [helper.make_tensor_value_info("y", 1, ["N", 1])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "sum.onnx")
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)

    def rows(outputs: Any) -> np.ndarray:
        got = np.concatenate([output["y"] for output in outputs])[:, 0]
        return ((got > 0) == (x.sum(1) > 0))[:, None].astype(np.float64)

    return Task("signs", tmp_path / "sum.onnx", [{"x": x}], {"x": x[:1]}, rows, percent, "{:.1f} %", ("x=Nx32",))


@pytest.fixture
def run(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(again=False)`: score the task with ROWS and give the rows of the results file."""
    monkeypatch.setattr(score, "TASKS", {"signs": lambda: task})
    monkeypatch.setattr(score, "OPTIONS", ROWS)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")

    def call(again: bool = False, bundles: bool = True) -> Mapping[str, Any]:
        score.score_task("signs", list(ROWS), again, bundles)
        rows: Mapping[str, Any] = json.loads((tmp_path / "results" / "signs.json").read_text())["rows"]
        return rows

    return call


def test_rows_are_compiled_and_judged_and_refusals_say_why(run: Any) -> None:
    rows = run()
    assert rows[score.REFERENCE]["score"] == rows["W8"]["score"] == 100.0 and rows["W8"]["lost"] == 0.0
    assert rows["W8"]["bits_per_weight"] == 8.5, "8 bits and a 16-bit scale for 32 weights"
    assert rows["newer"]["refused"] == "this build of kbitc has no option flux"
    assert "--bits is a whole number from 1 to 8" in rows["wrong"]["refused"]


def test_what_cannot_be_compiled_is_run_in_onnxruntime_and_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("no such kernel", where="sum")

    monkeypatch.setattr(score.kbitc, "compile", refuse)
    row = run()["W8"]
    assert row["score"] == 100.0 and "no such kernel" in row["refused"] and "weight_bytes" not in row


def test_what_is_finished_is_kept_until_the_samples_change(
    run: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    made: list[str] = []
    monkeypatch.setattr(score, "make_row", lambda task, name, *_, **__: made.append(name) or {"refused": "no"})
    run()
    assert made == ["newer", "wrong"], "a refusal is tried again"
    made.clear()
    run(again=True)
    assert made == list(ROWS)
    made.clear()
    task.batches[0]["x"][0, 0] += 1
    run()
    assert made == list(ROWS)


def test_samples_that_calibrate_are_part_of_the_rows_made_with_them(task: Task) -> None:
    import dataclasses

    other = dataclasses.replace(task, calibration=[{"x": np.ones((2, 32), np.float32)}])
    assert score.fingerprint(task, False) == score.fingerprint(other, False)
    assert score.fingerprint(task, True) != score.fingerprint(other, True)


def test_files_are_run_in_onnxruntime_where_asked_and_tables_get_their_own_bits(
    run: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    monkeypatch.setitem(ROWS, "tables", {"bits": 3, "activations": "float", "tables": "int8:b32"})
    assert "tables" not in run(bundles=False)
    monkeypatch.setattr(score, "TASKS", {"signs": lambda: dataclasses.replace(task, tables=("w",))})
    rows = run(bundles=False)
    assert rows["W8"]["run"] == "onnxruntime" and rows["W8"]["score"] == 100.0
    assert rows["tables"]["bits_per_weight"] == 8.5


def test_losses_are_points_or_factors(task: Task) -> None:
    import dataclasses

    high, low = np.array([[1.0], [1.0]]), np.array([[1.0], [0.0]])
    assert score.loss(task, low, high) == 50.0
    assert score.loss(dataclasses.replace(task, better="lower"), low, high) == -50.0
    assert score.loss(dataclasses.replace(task, in_factors=True), low, high) == 0.5


def test_every_row_of_options_names_something_else() -> None:
    kept = [json.dumps(options, sort_keys=True) for options in score.OPTIONS.values()]
    assert len(set(kept)) == len(kept)


def test_wilson_interval() -> None:
    """Values of the closed form, computed by hand for 0 of 10 and 5 of 10."""
    z2 = confidence.QUANTILE**2
    low, high = confidence.wilson(0, 10)
    assert low == 0.0 and high == pytest.approx(z2 / (10 + z2), rel=1e-12)
    low, high = confidence.wilson(5, 10)
    assert low + high == pytest.approx(1.0, abs=1e-12)
    assert high - low == pytest.approx(np.sqrt(z2 / (10 + z2)), rel=1e-12)


def test_bootstrap_of_a_mean_is_about_its_standard_error_wide_and_pairs_samples() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = confidence.bootstrap(percent, values)
    expected = 2 * confidence.QUANTILE * 100 * values.std() / 20
    # The spread of a quantile of 1000 draws at 0.025 is below 6 % of the standard error, on each side.
    assert abs((high - low) - expected) < 4 * 0.06 * expected / confidence.QUANTILE
    assert confidence.bootstrap(lambda a, b: percent(a) - percent(b), values, values - 1) == pytest.approx((100, 100))


def test_tables_show_every_row_and_stand_between_the_marks(run: Any, tmp_path: Path) -> None:
    run()
    readme = tmp_path / "README.md"
    (tmp_path / "results" / "other.json").write_text('{"rows of": "another script"}')
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.update_readme(readme, tmp_path / "results")
    text = readme.read_text()
    assert (
        text.startswith(f"before\n{tables.BEGIN}\n") and text.endswith(f"{tables.END}\nafter\n") and "old" not in text
    )
    assert "| W8 | 100.00 [91.24, 100.00] | 0.00 [0.00, 0.00] | 8.50 |" in text
    assert "| newer | | | | | not compiled: this build of kbitc has no option flux |" in text
    assert "| W8 | +0.00 |" in text
