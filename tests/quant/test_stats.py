"""Statistics: exact, the same for any order of the batches and any merging, in bounded memory."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from kbitc.quant.stats import HALF, CalibrationStats, Histogram, ValueStats

Float = npt.NDArray[np.float32]


def parts() -> list[Float]:
    """Batches of very different ranges, zeros, a single outlier, denormals."""
    rng = np.random.default_rng(0)
    scales = (1e-3, 1.0, 300.0, 0.0, 1e-40, 7.0)
    made = [(rng.standard_normal((4, 33)) * scale).astype(np.float32) for scale in scales]
    made[1][2, 5] = -1e6
    return made


def same(left: ValueStats, right: ValueStats) -> bool:
    a, b = CalibrationStats({"v": left}), CalibrationStats({"v": right})
    return a.to_bytes() == b.to_bytes()


def observed(batches: list[Float]) -> ValueStats:
    stats = ValueStats()
    for batch in batches:
        stats.add(batch)
    return stats


def test_any_order_gives_the_same_bits() -> None:
    reference = observed(parts())
    for order in itertools.permutations(range(6)):
        assert same(observed([parts()[index] for index in order]), reference)


@pytest.mark.parametrize("cut", range(7))
def test_merging_gives_the_same_bits(cut: int) -> None:
    left, right = observed(parts()[:cut]), observed(parts()[cut:])
    left.merge(right)
    assert same(left, observed(parts()))


@pytest.mark.parametrize("peak", [1.0, 0.999, 8191.0, 8192.0, 1e30, 3.4e38, 1e-30, 1e-45])
def test_counts_are_those_of_the_final_bins(peak: float) -> None:
    histogram = Histogram()
    numbers = np.linspace(-peak, peak, 999).astype(np.float32)
    for part in (numbers[400:600], numbers[600:], numbers[:400]):
        histogram.add(part)
    places = np.floor(numbers.astype(np.float64) / histogram.width).astype(int) + HALF
    np.testing.assert_array_equal(histogram.counts, np.bincount(places, minlength=2 * HALF))
    assert histogram.counts.sum() == 999


def test_the_quantile_is_right_to_one_bin() -> None:
    stats = observed([np.random.default_rng(1).standard_normal(100_000).astype(np.float32)])
    numbers = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    for share in (0.0001, 0.25, 0.5, 0.999):
        found = stats.values.quantile(share)
        rank = np.quantile(numbers, share, method="inverted_cdf")
        assert found - stats.values.width <= rank <= found


def test_numbers_that_are_not_finite_are_counted_apart() -> None:
    stats = observed([np.array([[1.0, np.inf], [np.nan, -2.0]], np.float32)])
    assert (stats.low, stats.high, stats.infinite, stats.count) == (-2.0, 1.0, 2, 2)
    empty = observed([np.full((2, 2), np.nan, np.float32)])
    assert empty.count == 0 and empty.batch_mean() == (0.0, 0.0)


def test_the_mean_of_batches_is_exact() -> None:
    stats = observed([np.array([x], np.float32) for x in (1e30, 1.0, -1e30, 2.0)])
    assert stats.batch_mean() == (0.75, 0.75)


def test_bytes_and_back() -> None:
    stats = CalibrationStats()
    for part in parts():
        stats.add({"a": part, "b/c": -part})
    again = CalibrationStats.from_bytes(stats.to_bytes())
    assert again.to_bytes() == stats.to_bytes() and again.batches == 6
    assert again.as_json() == stats.as_json()
    with pytest.raises((ValueError, KeyError, OSError)):
        CalibrationStats.from_bytes(b"\x80\x04pickle")
