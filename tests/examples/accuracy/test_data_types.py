"""The tables of data types: every family and width, and a document that is updated in place."""

from __future__ import annotations

from pathlib import Path

import data_types
import numpy as np
import pytest

from kbitc.passes.solvers import rtn
from kbitc.quant.scheme import QuantScheme


def test_the_table_holds_every_family_and_marks_the_best_of_each_width() -> None:
    weights = [np.random.default_rng(0).normal(size=(16, 1, 256)).astype(np.float32)]
    lines = data_types.family_table(weights, rtn.solve).splitlines()[2:]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert tuple(cells) == data_types.FAMILIES
    found = data_types.mean_sqnr(weights, QuantScheme.parse("kmeans4:b64"), rtn.solve)
    assert cells["kmeans"][2] == f"**{found:.1f}**"
    for width in range(len(data_types.WIDTHS)):
        column = [row[width] for row in cells.values() if len(row) > width and row[width].strip()]
        assert sum(text.startswith("**") for text in column) == 1


def test_rows_of_a_large_weight_are_sampled_evenly() -> None:
    weight = np.arange(4 * data_types.MOST_WEIGHTS, dtype=np.float32).reshape(-1, 1, 1024)
    found = data_types.sample(weight)
    assert found.size <= data_types.MOST_WEIGHTS and (np.diff(found[:, 0, 0]) == 4 * 1024).all()


def test_a_document_is_updated_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{data_types.BEGIN}old\n{data_types.END}after\n", encoding="utf-8")
    monkeypatch.setattr(data_types, "report", lambda solver: f"tables of {solver}\n")
    monkeypatch.setattr("sys.argv", ["data_types.py", "--update", str(document)])
    for _ in range(2):
        data_types.main()
        expected = f"before\n{data_types.BEGIN}\ntables of rtn\n\n{data_types.END}after\n"
        assert document.read_text(encoding="utf-8") == expected
