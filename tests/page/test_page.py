"""The page of `kbitc analyze`: it holds everything, asks nobody, and survives hostile names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kbitc.cli import _guarded
from kbitc.page import charts, verdict
from kbitc.page.render import render
from kbitc.quant.plan import parse_plan
from tests.support import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("analysis")
    onnx.save(ir.to_proto(planned.model()), made / "model.onnx")
    arguments = ["analyze", made / "model.onnx", "-o", made / "report.html", "--write-plan", made / "plan.json"]
    assert _guarded([str(item) for item in arguments]) == 0
    return made


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


class _Reader(HTMLParser):
    """Tags that are open, and attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_and_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert _read(page).loads == []
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page


def test_every_layer_has_its_row_and_its_histograms(folder: Path, data: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text()
    assert [layer["tensor"] for layer in data["layers"]] == list(planned.SHAPES)
    assert page.count('<tr class="layer"') == page.count('<tr class="detail"') == len(planned.SHAPES)
    assert "made up" in page


def test_the_suggested_plan_is_a_plan_of_at_most_the_same_size(folder: Path, data: dict[str, Any]) -> None:
    written = json.loads((folder / "plan.json").read_text())
    assert written == data["suggested"]["plan"]
    assert len(parse_plan(written, "plan.json")) == len(planned.SHAPES)
    four = next(row for row in data["widths"] if row["bits"] == 4)
    assert data["suggested"]["bytes"] <= four["bytes"]
    arguments = ["quantize", folder / "model.onnx", "-o", folder / "q.onnx", "--plan", folder / "plan.json"]
    assert _guarded([str(item) for item in arguments]) == 0


def test_more_bits_bring_the_whole_model_closer(data: dict[str, Any]) -> None:
    found = {row["bits"]: row["sqnr_db"] for row in data["widths"]}
    assert found[2] < found[4] < found[8]
    assert data["noise"]["together_db"] == pytest.approx(found[4])


def test_names_from_the_model_are_text(data: dict[str, Any]) -> None:
    hostile = "</td><script>alert('x')</script>\"onload=\""
    changed = json.loads(json.dumps(data).replace('": "first"', '": ' + json.dumps(hostile)))
    page = render(changed)
    assert _read(page).tags.count("script") == 1
    assert "<script>alert" not in page


def test_an_output_that_exists_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "report.html").read_bytes()
    assert _guarded(["analyze", str(folder / "model.onnx"), "-o", str(folder / "report.html")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before


def test_a_model_without_weights_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert _guarded(["analyze", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert "no weight of the model can be quantized" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_the_verdict_names_the_fewest_weights_that_make_most_of_the_noise() -> None:
    layers = [{"noise": noise, "tensor": name} for name, noise in (("a", 1.0), ("b", 6.0), ("c", 2.0), ("d", 1.0))]
    chosen, share = verdict.leading(layers)
    assert [layer["tensor"] for layer in chosen] == ["b", "c"] and share == pytest.approx(0.8)
    assert verdict.leading([{"noise": 0.0}]) == ([], 0.0)
    assert [verdict.grade(value) for value in (31, 25, 19)] == ["good", "fair", "bad"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-1.2, 1.2, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
        (0, 0.004, [0, 0.001, 0.002, 0.003, 0.004]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_the_analysed_plan_is_solved_as_asked(folder: Path, data: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **planned.feeds()[0])
    arguments = ["analyze", folder / "model.onnx", "--calibration", tmp_path / "data.npz"]
    found = {}
    for solver in ("rtn", "gptq"):
        page = tmp_path / f"{solver}.html"
        assert _guarded([str(item) for item in (*arguments, "--solver", solver, "-o", page)]) == 0
        found[solver] = json.loads(page.with_suffix(".json").read_text())
        assert found[solver]["model"]["solver"] == solver
        assert (f"rounded by {solver}" in page.read_text()) == (solver != "rtn")
    nearest, solved = (found[solver]["layers"] for solver in found)
    assert [layer["alone_db"] for layer in nearest] == [layer["alone_db"] for layer in solved]
    assert [layer["weight_db"] for layer in nearest] != [layer["weight_db"] for layer in solved]
    assert found["gptq"]["noise"]["weights_db"] > found["rtn"]["noise"]["weights_db"]
    assert data["model"]["solver"] == "rtn"
