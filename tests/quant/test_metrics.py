"""Distances between two runs."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import AccuracyError
from kbitc.quant.metrics import MAX_SQNR, compare


def test_equal_runs_are_perfect() -> None:
    run = [{"y": np.arange(6, dtype=np.float32).reshape(2, 3)}]
    found = compare(run, run)["y"]
    assert (found.sqnr_db, found.cosine, found.max_error, found.top1_agreement, found.samples) == (
        MAX_SQNR, pytest.approx(1.0), 0.0, 1.0, 1,
    )  # fmt: skip


def test_known_distance_over_two_samples() -> None:
    reference = [{"y": np.array([[3.0, 4.0]])}, {"y": np.array([[0.0, 5.0]])}]
    result = [{"y": np.array([[4.0, 3.0]])}, {"y": np.array([[0.0, 5.0]])}]
    found = compare(reference, result)["y"]
    assert found.sqnr_db == pytest.approx(10 * np.log10(50 / 2))
    assert found.max_error == 1.0
    assert found.top1_agreement == 0.5


def test_equal_infinities_are_no_error() -> None:
    run = [{"y": np.array([1.0, np.inf, np.nan])}]
    assert compare(run, run)["y"].max_error == 0.0


@pytest.mark.parametrize(("expected", "found"), [(1.0, np.nan), (1.0, np.inf), (np.inf, 1.0), (np.inf, -np.inf)])
def test_finiteness_must_agree(expected: float, found: float) -> None:
    with pytest.raises(AccuracyError, match="finite"):
        compare([{"y": np.array([expected])}], [{"y": np.array([found])}])


def test_a_changed_shape_is_refused() -> None:
    with pytest.raises(AccuracyError, match="changed its shape"):
        compare([{"y": np.zeros(2)}], [{"y": np.zeros(3)}])
