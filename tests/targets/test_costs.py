"""The cost model: exact where it was measured, between its neighbours elsewhere, honest where it knows nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kbitc.bundle.manifest import ValueInfo
from kbitc.targets.costs import (
    FLOAT_BITS,
    Costs,
    Row,
    Speeds,
    Work,
    as_row,
    costs_from,
    predicted,
    read_costs,
    sizes_of,
    with_predictions,
    work_of,
)
from kbitc.targets.measure_costs import contractions, rows_of
from kbitc.targets.target import all_targets
from kbitc.targets.trial import Trial

WORK = Work(128, 768, 1, 768, 4)
FACTS: dict[str, Any] = {
    "name": "n", "kind": "matmul", "rule": "integer_product", "activation": "int8", "bits": 4,
    "weight_shape": [768, 1, 768], "out_shape": ["batch", 768],
}  # fmt: skip


def test_one_row_gives_its_own_rate_to_every_size() -> None:
    costs = Costs((Row("r", WORK, 100.0),))
    assert costs.predict("r", WORK, integer=True) == pytest.approx(100.0, rel=1e-12)
    assert costs.predict("r", replace(WORK, rows=256), integer=True) == pytest.approx(200.0, rel=1e-12)
    assert costs.predict("other", WORK, integer=True) is None


def test_a_product_lies_between_its_neighbours_and_nearer_to_the_nearer() -> None:
    slow, fast = Row("r", replace(WORK, rows=1), 10.0), Row("r", replace(WORK, rows=128), 128.0)
    costs = Costs((slow, fast))

    def rate(rows: int) -> float:
        found = costs.predict("r", replace(WORK, rows=rows), integer=True)
        assert found is not None
        return found / rows

    assert 1.0 < rate(100) < rate(10) < rate(2) < 10.0


def test_a_width_lies_between_its_neighbours() -> None:
    rows = tuple(Row("r", replace(WORK, bits=bits), float(bits)) for bits in (4, 8))
    found = Costs(rows).predict("r", replace(WORK, bits=7), integer=True)
    assert found is not None and 32**0.5 < found < 8.0  # nearer to 8 than the geometric mean of both


def test_a_machine_that_was_not_measured_is_bound_by_the_slower_of_reading_and_computing() -> None:
    costs = Costs((), Speeds(read=10.0, floats=20.0, integers=80.0, start=2.0))
    row = Work(1, 1024, 1, 1024, 4)
    assert costs.predict("r", row, integer=True) == pytest.approx(2.0 + row.moved / 10.0 / 1e3, rel=1e-12)
    assert costs.predict("r", WORK, integer=True) == pytest.approx(2.0 + WORK.products / 80.0 / 1e3, rel=1e-12)
    assert costs.predict("r", WORK, integer=False) == pytest.approx(2.0 + WORK.products / 20.0 / 1e3, rel=1e-12)
    assert costs.predict("r", replace(WORK, rows=0), integer=False) == 0.0


def test_symbolic_dims_are_those_of_the_inputs() -> None:
    inputs = [ValueInfo("x", "float32", ("batch", 768))]
    assert sizes_of(inputs, {"x": np.zeros((5, 768), np.float32)}) == {"batch": 5}
    assert work_of(FACTS, {"batch": 5}) == Work(5, 768, 1, 768, 4)
    assert work_of(FACTS, {}) is None
    assert work_of({**FACTS, "kind": "embedding"}, {"batch": 5}) is None


def test_a_report_says_what_it_does_not_know() -> None:
    unknown = {**FACTS, "kind": "batch_matmul"}
    known, other = with_predictions([FACTS, unknown], "arm-neon:dotprod", {"batch": 5})
    assert known["predicted_microseconds"] > 0 and other["predicted_microseconds"] is None
    assert known["predicted_from"].startswith("arm-neon:dotprod, not measured")
    assert predicted(FACTS, "reference", {"batch": 5}) is None


def test_every_target_but_the_reference_has_a_table() -> None:
    shipped = read_costs()
    assert set(shipped) == {target.name for target in all_targets()} - {"reference"}
    for name, costs in shipped.items():
        assert costs.machine and (costs.rows or costs.speeds), name
        assert costs.rows or "not measured" in costs.machine, name
        if name.startswith("x86") and costs.rows:
            rules = {row.rule for row in costs.rows}
            assert rules >= {"integer_product", "float_product", "unpacked_conv", "float_depthwise"}, name
            again = costs_from({"rows": [as_row(row) for row in costs.rows], "machine": costs.machine})
            assert again.rows == costs.rows


def test_what_is_measured_covers_all_widths_and_becomes_rows() -> None:
    made = list(contractions())
    assert len({item.name for item in made}) == len(made)
    assert {getattr(item.weight, "bits", FLOAT_BITS) for item in made} == {*range(1, 9), FLOAT_BITS}
    trials = [Trial(item.name, item) for item in made if item.conv is not None and item.conv.group > 1]
    first, *_ = rows_of(trials, {trials[0].name: ("float_depthwise", 3.0)})
    assert first == Row("float_depthwise", Work(28 * 28, 64, 9, 1, FLOAT_BITS), 3.0)
