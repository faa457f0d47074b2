"""Observers on numbers whose best range is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kbitc import catalog
from kbitc.passes.observers import measured
from kbitc.quant.stats import ValueStats

OBSERVERS = ("entropy", "measured", "minmax", "moving_average", "mse", "per_token", "percentile")
Float = npt.NDArray[np.float32]


def stats_of(*batches: Float) -> ValueStats:
    stats = ValueStats()
    for batch in batches:
        stats.add(batch.astype(np.float32))
    return stats


def observe(name: str, stats: ValueStats, levels: int = 256) -> tuple[float, float]:
    low, high = catalog.find("kbitc.passes.observers", name, "observer").observe(stats, levels)
    return float(low), float(high)


def squared_error(numbers: Float, low: float, high: float, levels: int) -> float:
    step = (high - low) / (levels - 1)
    codes = np.clip(np.rint((numbers - low) / step), 0, levels - 1)
    return float(((codes * step + low - numbers) ** 2).mean())


def test_every_observer_is_a_file() -> None:
    assert tuple(catalog.names("kbitc.passes.observers")) == OBSERVERS


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("kind", ["normal", "positive", "constant", "zero", "negative"])
def test_ranges_are_finite_ordered_and_within_what_was_seen(name: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    made = {
        "normal": rng.standard_normal((64, 100)),
        "positive": np.maximum(rng.standard_normal((64, 100)), 0),
        "constant": np.full((4, 4), 2.5),
        "zero": np.zeros((4, 4)),
        "negative": -rng.random((64, 100)) - 1,
    }
    stats = stats_of(made[kind])
    low, high = observe(name, stats)
    assert np.isfinite([low, high]).all() and low <= high
    assert low >= min(stats.low, 0.0) and high <= max(stats.high, 0.0)


def test_minmax_and_the_mean_of_batches() -> None:
    stats = stats_of(np.array([[-1.0, 3.0]]), np.array([[-3.0, 1.0]]))
    assert observe("minmax", stats) == (-3.0, 3.0)
    assert observe("moving_average", stats) == (-2.0, 2.0)


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    numbers = np.random.default_rng(0).standard_normal(1_000_000)
    low, high = observe("percentile", stats_of(numbers))
    outside = float(((numbers < low) | (numbers > high)).mean())
    assert 0.5e-4 < outside < 1.5e-4


def test_per_token_keeps_whole_rows() -> None:
    """One large number in the same column of every row: a percentile of numbers loses it, this does not."""
    numbers = np.random.default_rng(0).standard_normal((500, 20_000))
    numbers[:, 7] = 50.0
    stats = stats_of(numbers)
    assert observe("percentile", stats)[1] < 6
    assert observe("per_token", stats)[1] == pytest.approx(50.0, abs=stats.row_highs.width)


@pytest.mark.parametrize("levels", [16, 64, 256])
def test_mse_beats_the_full_range_on_heavy_tails(levels: int) -> None:
    numbers = np.random.default_rng(0).standard_t(3, 200_000).astype(np.float32)
    stats = stats_of(numbers)
    best = squared_error(numbers, *observe("mse", stats, levels), levels)
    assert best < squared_error(numbers, stats.low, stats.high, levels)
    for factor in (0.5, 0.8, 1.25, 2.0):
        low, high = (factor * end for end in observe("mse", stats, levels))
        assert best <= 1.02 * squared_error(numbers, low, high, levels)


def test_entropy_clips_a_far_outlier_and_keeps_a_uniform_range() -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(200_000)
    normal[0] = 100.0
    low, high = observe("entropy", stats_of(normal))
    assert 2.5 < high < 20 and -20 < low < -2.5
    uniform = rng.random(200_000) * 2 - 1
    low, high = observe("entropy", stats_of(uniform))
    assert high > 0.95 and low < -0.95


def test_measured_offers_ranges_from_the_percentile_to_everything_seen() -> None:
    numbers = np.concatenate([np.random.default_rng(0).standard_normal(100_000), [40.0, -9.0]])
    stats = stats_of(numbers.reshape(1, -1))
    offered = measured.candidates(stats, 256)
    assert offered[0] == observe("percentile", stats) == observe("measured", stats)
    assert (stats.low, stats.high) in [pytest.approx(each) for each in offered]
    for index, (low, high) in enumerate(offered):
        for other in offered[:index]:
            ratios = [max(one, two) / min(one, two) for one, two in zip((low, high), other, strict=True)]
            assert max(ratios) > measured.APART


def test_measured_offers_one_range_of_numbers_without_outliers() -> None:
    stats = stats_of(np.random.default_rng(0).uniform(0, 1, (100, 100)))
    assert len(measured.candidates(stats, 256)) == 1
    assert measured.candidates(stats_of(np.zeros((4, 4))), 256) == [(0.0, 0.0)]
