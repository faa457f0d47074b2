"""Scores, their intervals, and metric scripts that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kbitc.errors import CalibrationError, UsageError
from kbitc.passes.verify.score import (
    judge_cosine,
    judge_script,
    judge_sqnr,
    judge_top1,
    make_judge,
    read_labels,
    wilson,
)

Outputs = list[dict[str, Any]]


def _logits(wrong: int, count: int = 100, rows: int = 1) -> tuple[Outputs, Outputs]:
    """`wrong` of `count` samples have another largest element (of `rows` rows a sample, the first)."""
    original = np.zeros((count, rows, 3), np.float32)
    original[:, :, 1] = 1
    found = original.copy()
    found[:wrong, 0, 2] = 2
    if rows == 1:
        original, found = original[:, 0], found[:, 0]
    cut = [slice(0, 64), slice(64, count)]
    return [{"y": original[part]} for part in cut], [{"y": found[part]} for part in cut]


def test_wilsons_interval_is_the_published_one() -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    for hits, count, expected in [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ]:
        assert wilson(hits, count) == pytest.approx(expected, abs=5e-5)


def test_top1_of_single_rows_is_a_share_with_wilsons_interval() -> None:
    score = judge_top1(*_logits(7))
    low, high = wilson(93, 100)
    assert (score.drop, score.samples, score.method) == (pytest.approx(0.07), 100, "Wilson")
    assert (score.low, score.high) == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert str(score).startswith("top1 falls 7.00 % (95 % interval 3.")


def test_no_difference_is_not_certainty() -> None:
    for rows in (1, 5):
        score = judge_top1(*_logits(0, rows=rows))
        assert score.drop == 0 and score.low == 0 and score.high == pytest.approx(1 - wilson(100, 100)[0])
    ones = [{"y": np.ones((50, 2), np.float32)}]
    assert judge_script("s", lambda y, _: y["y"][:, 0], None, ones, ones).high == pytest.approx(1 - wilson(50, 50)[0])


def test_rows_of_one_sample_are_drawn_together() -> None:
    """Ten wrong rows in ten of 100 samples of five rows: the spread is that of samples, drop / sqrt(10) and more."""
    score = judge_top1(*_logits(10, rows=5))
    assert score.drop == pytest.approx(0.02) and score.method == "bootstrap over samples"
    assert score.low is not None and score.high is not None
    # sd of the mean of 100 samples with 0.2 in ten of them: 0.2 * sqrt(0.1 * 0.9 / 100) = 0.006
    assert score.high - score.low == pytest.approx(2 * 1.96 * 0.006, rel=0.15)


def test_sqnr_and_cosine_are_of_the_worst_output() -> None:
    random = np.random.default_rng(0)
    good, bad = (random.normal(size=(40, 8)).astype(np.float32) for _ in range(2))
    original = [{"good": good, "bad": bad}]
    found = [{"good": good, "bad": bad * np.float32(1.1)}]
    score = judge_sqnr(original, found)
    assert score.drop == pytest.approx(0.01, rel=1e-5)
    assert score.low == pytest.approx(0.01, rel=1e-5) and score.high == pytest.approx(0.01, rel=1e-5)
    assert judge_cosine(original, found).drop == pytest.approx(0, abs=1e-7)
    turned = judge_cosine(original, [{"good": good, "bad": -bad}])
    assert turned.drop == pytest.approx(2)


def test_a_script_with_a_number_a_sample_is_bootstrapped_in_pairs() -> None:
    original, found = _logits(10)
    labels = np.ones(120, np.int64)
    labels[50:60] = 0

    def score(outputs: dict[str, Any], known: Any) -> Any:
        return outputs["y"].argmax(1) == known

    result = judge_script("accuracy", score, labels, original, found)
    assert (result.original, result.found, result.drop) == (pytest.approx(0.9), pytest.approx(0.8), pytest.approx(0.1))
    assert result.samples == 100 and result.low is not None and result.high is not None
    assert 0.03 < result.low < 0.06 and 0.14 < result.high < 0.18  # 0.1 -+ 1.96 * 0.03


def test_a_script_with_one_number_is_bootstrapped_over_its_samples() -> None:
    original, found = _logits(10)
    result = judge_script("mean", lambda outputs, _: float((outputs["y"].argmax(1) == 1).mean()), None, original, found)
    assert result.drop == pytest.approx(0.1) and result.low is not None and result.high is not None
    assert 0.02 < result.low < 0.07 and 0.13 < result.high < 0.2


def test_samples_of_different_shapes_give_a_score_without_an_interval() -> None:
    original = [{"y": np.ones((1, 3))}, {"y": np.ones((1, 4))}]
    result = judge_script("s", lambda outputs, _: float(len(outputs["y"])), None, original, original)
    assert result.drop == 0 and result.low is None and "no interval" in str(result)


@pytest.mark.parametrize("value", [np.nan, [[1.0]], [], "x", None])
def test_a_script_that_gives_no_number_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="score"):
        judge_script("s", lambda outputs, _: value, None, *_logits(0))


def test_a_script_that_fails_is_one_line_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"score\(\) fails.*KeyError: 'logits'") as caught:
        judge_script("s", lambda outputs, _: outputs["logits"], None, *_logits(0))
    assert "\n" not in str(caught.value)


def test_fewer_labels_than_samples_are_refused() -> None:
    with pytest.raises(CalibrationError, match="fewer labels"):
        judge_script("s", lambda *_: 1.0, np.ones(99), *_logits(0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "defines no score"),
        ("import nothing_there", "fails.*ModuleNotFoundError"),
        ("score = 3", "defines no score"),
    ],
)
def test_scripts_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "metric.py").write_text(content)
    with pytest.raises(UsageError, match=message):
        make_judge(str(tmp_path / "metric.py"), None)


def test_names_that_are_no_metric(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean top1"):
        make_judge("top-1", None)
    with pytest.raises(UsageError, match="does not exist"):
        make_judge(str(tmp_path / "none.py"), None)
    with pytest.raises(UsageError, match="--labels go with a metric script"):
        make_judge("top1", tmp_path / "labels.npy")


def test_labels_are_one_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(CalibrationError, match="one array"):
        read_labels(tmp_path / "two.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    assert read_labels(tmp_path / "one.npy").tolist() == [0, 1, 2]
