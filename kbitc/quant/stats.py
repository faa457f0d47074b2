"""What the values of a model look like over a data set: streaming, mergeable, of bounded memory.

Everything is kept in integers or as minima and maxima, and bin edges are multiples of a power of two, so the result is
the same bits for any order of the batches and any way of merging partial results.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import frexp, ldexp
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]

#: Bins on each side of zero: an 8-bit step of a range clipped to 1/32 of the largest value still spans two bins.
HALF_BITS = 13
HALF = 1 << HALF_BITS
#: The smallest bin is 2^-100 wide: 1 / width stays in the range of float32.
MIN_EXPONENT = -100
#: Every float32 is a multiple of this power of two, so that sums of them are exact in integers.
UNIT_EXPONENT = -149
#: Numbers counted at once: what they need fits a second-level cache.
_CHUNK = 1 << 17


@dataclass
class Histogram:
    """Counts of numbers x by floor(x / 2^exponent), which lies in [-HALF, HALF).

    The exponent is the smallest that holds the largest magnitude seen. When it grows by one, pairs of bins become one:
    floor(floor(x / w) / 2) = floor(x / 2w), so the counts are those that the larger width would have given at once.

    Attributes:
        exponent: bins are 2^exponent wide.
        counts: int64 [2 HALF]; bin i covers [(i - HALF) w, (i - HALF + 1) w).
    """

    exponent: int = MIN_EXPONENT
    counts: Counts = field(default_factory=lambda: np.zeros(2 * HALF, np.int64))

    @property
    def width(self) -> float:
        """Width of a bin in units of x."""
        return ldexp(1.0, self.exponent)

    def add(self, values: FloatArray) -> None:
        """Count finite float32 numbers of any shape."""
        if values.size == 0:
            return
        self._grow(_exponent_of(max(abs(float(values.min())), abs(float(values.max())))))
        inverse = np.float32(ldexp(1.0, -self.exponent))
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            places = np.floor(flat[start : start + _CHUNK] * inverse).astype(np.int64)
            places += HALF
            self.counts += np.bincount(places, minlength=2 * HALF)

    def merge(self, other: Histogram) -> None:
        """Count what the other histogram counted."""
        self._grow(other.exponent)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)

    def _grow(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def edges(self) -> tuple[npt.NDArray[np.float64], Counts]:
        """(lower edges f64 [B], counts [B]) of the span of bins that are not empty."""
        used = np.flatnonzero(self.counts)
        if used.size == 0:
            return np.zeros(0), np.zeros(0, np.int64)
        first, last = int(used[0]), int(used[-1]) + 1
        return (np.arange(first, last, dtype=np.float64) - HALF) * self.width, self.counts[first:last]

    def quantile(self, share: float) -> float:
        """The smallest bin edge with at least `share` of the numbers below it; 0 of none."""
        lower, counts = self.edges()
        if lower.size == 0:
            return 0.0
        index = int(np.searchsorted(np.cumsum(counts), share * float(counts.sum()), side="left"))
        return float(lower[min(index, lower.size - 1)]) + self.width


def _exponent_of(peak: float) -> int:
    """The smallest exponent of a bin width with which |x| <= peak falls into the histogram."""
    return max(frexp(peak)[1] - HALF_BITS, MIN_EXPONENT) if peak else MIN_EXPONENT


def _coarser(counts: Counts, steps: int) -> Counts:
    """The counts of bins 2^steps times as wide."""
    if steps == 0:
        return counts
    if steps > HALF_BITS:
        result = np.zeros_like(counts)
        result[HALF - 1], result[HALF] = counts[:HALF].sum(), counts[HALF:].sum()
        return result
    half = HALF >> steps
    result = np.zeros_like(counts)
    result[HALF - half : HALF + half] = counts.reshape(-1, 1 << steps).sum(axis=1)
    return result


@dataclass
class ValueStats:
    """One value of the graph.

    Attributes:
        low, high: smallest and largest finite number; inf and -inf before any.
        low_sum, high_sum: sums over the batches of their smallest and largest number, in units of 2^-149.
        batches: batches with a finite number.
        infinite: numbers that are not finite.
        values: histogram of all numbers.
        row_lows, row_highs: histograms of the smallest and largest number of each row along the last axis (a token).
    """

    low: float = np.inf
    high: float = -np.inf
    low_sum: int = 0
    high_sum: int = 0
    batches: int = 0
    infinite: int = 0
    values: Histogram = field(default_factory=Histogram)
    row_lows: Histogram = field(default_factory=Histogram)
    row_highs: Histogram = field(default_factory=Histogram)

    @property
    def count(self) -> int:
        """Finite numbers seen."""
        return int(self.values.counts.sum())

    def add(self, array: FloatArray) -> None:
        """Take in one batch, of any shape."""
        numbers = np.asarray(array, np.float32)
        finite = np.isfinite(numbers)
        if not finite.all():
            self.infinite += int(numbers.size - finite.sum())
            numbers = numbers[finite]
        if numbers.size == 0:
            return
        rows = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim > 1 else numbers.reshape(1, -1)
        lows, highs = rows.min(axis=1), rows.max(axis=1)
        low, high = float(lows.min()), float(highs.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.low_sum += _units(low)
        self.high_sum += _units(high)
        self.batches += 1
        self.values.add(numbers)
        self.row_lows.add(lows)
        self.row_highs.add(highs)

    def merge(self, other: ValueStats) -> None:
        """Take in what another observed."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.low_sum += other.low_sum
        self.high_sum += other.high_sum
        self.batches += other.batches
        self.infinite += other.infinite
        self.values.merge(other.values)
        self.row_lows.merge(other.row_lows)
        self.row_highs.merge(other.row_highs)

    def batch_mean(self) -> tuple[float, float]:
        """Mean over the batches of their smallest and of their largest number."""
        if not self.batches:
            return 0.0, 0.0
        return (_from_units(self.low_sum, self.batches), _from_units(self.high_sum, self.batches))


def _units(number: float) -> int:
    """A float32 as a whole multiple of 2^-149."""
    numerator, denominator = number.as_integer_ratio()
    return (numerator << -UNIT_EXPONENT) // denominator


def _from_units(total: int, count: int) -> float:
    return float(total / (count << -UNIT_EXPONENT))


@dataclass
class CalibrationStats:
    """Statistics by value name, and how many batches were seen."""

    values: dict[str, ValueStats] = field(default_factory=dict)
    batches: int = 0

    def add(self, arrays: Mapping[str, FloatArray]) -> None:
        """Take in the named values of one batch."""
        for name, array in arrays.items():
            self.add_value(name, array)
        self.batches += 1

    def add_value(self, name: str, array: FloatArray) -> None:
        """Take in one more value of the last batch."""
        self.values.setdefault(name, ValueStats()).add(array)

    def merge(self, other: CalibrationStats) -> None:
        """Take in what another collected on other batches."""
        for name, stats in other.values.items():
            self.values.setdefault(name, ValueStats()).merge(stats)
        self.batches += other.batches

    def as_json(self) -> dict[str, Any]:
        """A summary, plain data for json.dumps."""
        return {
            "batches": self.batches,
            "values": {
                name: {"count": item.count, "low": item.low, "high": item.high, "infinite": item.infinite}
                for name, item in sorted(self.values.items())
                if item.count
            },
        }

    def to_bytes(self) -> bytes:
        """A compressed .npz of plain arrays."""
        arrays: dict[str, Any] = {"names": np.array(list(self.values), np.str_), "batches": np.array(self.batches)}
        for index, item in enumerate(self.values.values()):
            arrays[f"{index}.range"] = np.array([item.low, item.high])
            numbers = (item.low_sum, item.high_sum, item.batches, item.infinite)
            arrays[f"{index}.sums"] = np.array([f"{number:x}" for number in numbers], np.str_)
            for name in _HISTOGRAMS:
                histogram: Histogram = getattr(item, name)
                places = np.flatnonzero(histogram.counts)
                arrays[f"{index}.{name}"] = np.stack([places, histogram.counts[places]])
                arrays[f"{index}.{name}.exponent"] = np.array(histogram.exponent)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CalibrationStats:
        """What `to_bytes` gave.

        Raises:
            ValueError, KeyError, OSError or zipfile.BadZipFile: the bytes are something else.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            names = [str(name) for name in arrays["names"]]
            values = {name: _read(arrays, str(index)) for index, name in enumerate(names)}
            return cls(values, int(arrays["batches"]))


_HISTOGRAMS = ("values", "row_lows", "row_highs")


def _read(arrays: Mapping[str, npt.NDArray[Any]], key: str) -> ValueStats:
    low, high = (float(number) for number in arrays[f"{key}.range"])
    low_sum, high_sum, batches, infinite = (int(str(text), 16) for text in arrays[f"{key}.sums"])
    found = {}
    for name in _HISTOGRAMS:
        places, counts = arrays[f"{key}.{name}"]
        histogram = Histogram(int(arrays[f"{key}.{name}.exponent"]))
        histogram.counts[places] = counts
        found[name] = histogram
    return ValueStats(low, high, low_sum, high_sum, batches, infinite, *(found[name] for name in _HISTOGRAMS))
