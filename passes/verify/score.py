"""Scores for `--max-drop`: how far a model falls, with the confidence that the number of samples allows.

    top1    share of rows whose largest element is the float model's        drop = 1 - share
    sqnr    noise over signal of the worst output                           drop = noise / signal
    cosine  cosine of the worst output with the float model's               drop = 1 - cosine
    FILE    score(outputs, labels) of a Python file of the user             drop = score(float) - score(quantized)

Intervals have 95 %. A share of independent rows has Wilson's interval (Brown, Cai, DasGupta, Interval Estimation for a
Binomial Proportion, 2001, equation 4); everything else the percentile interval of a paired bootstrap over samples
(Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3). A sample is an entry along axis 0.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.catalog import nearest
from kbitc.errors import CalibrationError, UsageError
from kbitc.importer.arrays import read_arrays

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Outputs = Sequence[Mapping[str, Array]]  # one mapping a batch

NAMES = ("top1", "sqnr", "cosine")
Z = 1.959963984540054  # 95 %
RESAMPLES, RESAMPLES_OF_SCRIPTS = 2000, 200
CONFIDENCE = (2.5, 97.5)


@dataclass(frozen=True)
class Score:
    """A comparison of two models.

    Attributes:
        metric: its name.
        original, found: scores of the float and of the quantized model.
        drop: original - found.
        low, high: 95 % interval of the drop; None where the samples cannot be told apart.
        samples: how many there are.
        method: where the interval comes from.
    """

    metric: str
    original: float
    found: float
    drop: float
    low: float | None
    high: float | None
    samples: int
    method: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return dict(vars(self))

    def __str__(self) -> str:
        text = f"{self.metric} falls {100 * self.drop:.2f} %"
        if self.low is None or self.high is None:
            return f"{text} ({self.samples} samples, no interval: {self.method})"
        ends = f"{100 * self.low:.2f} to {100 * self.high:.2f} %"
        return f"{text} (95 % interval {ends}, {self.samples} samples, {self.method})"


Judge = Callable[[Outputs, Outputs], Score]


def make_judge(metric: str, labels: Path | None) -> Judge:
    """The function (float outputs, quantized outputs) -> `Score` of a metric.

    Raises:
        UsageError: no such metric, or a script that cannot be used.
        CalibrationError: the labels cannot be read.
    """
    if metric.endswith(".py"):
        function = load_script(Path(metric))
        array = None if labels is None else read_labels(labels)
        return lambda original, found: judge_script(Path(metric).stem, function, array, original, found)
    if labels is not None:
        raise UsageError("--labels go with a metric script", got=f"--metric {metric}", remedy="give --metric FILE.py")
    if metric not in NAMES:
        remedy = f"{nearest(metric, list(NAMES))}, or give a .py file with score(outputs, labels)"
        raise UsageError("unknown metric", got=repr(metric), remedy=remedy)
    return {"top1": judge_top1, "sqnr": judge_sqnr, "cosine": judge_cosine}[metric]


def load_script(path: Path) -> Callable[[Any, Any], Any]:
    """The function `score` of a Python file that the user names; it is run.

    Raises:
        UsageError: it is missing, fails, or defines no such function.
    """
    if not path.is_file():
        raise UsageError("the metric script does not exist", got=str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError("the metric script cannot be loaded", got=str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError("the metric script fails", where=str(path), got=f"{type(error).__name__}: {error}") from error
    function = getattr(module, "score", None)
    if not callable(function):
        raise UsageError("the metric script defines no score(outputs, labels)", where=str(path))
    return function  # type: ignore[no-any-return]


def read_labels(path: Path) -> Array:
    """The one array of a .npy or .npz file.

    Raises:
        CalibrationError: there is not exactly one.
    """
    arrays = read_arrays(path)
    if len(arrays) != 1:
        raise CalibrationError("labels are one array", where=str(path), got=f"{len(arrays)} arrays")
    return next(iter(arrays.values()))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = hits / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(drop: Callable[[npt.NDArray[np.int64]], float], samples: int, resamples: int) -> tuple[float, float]:
    """Percentile interval of drop(indices of samples drawn with replacement)."""
    random = np.random.default_rng(0)
    found = [drop(random.integers(0, samples, samples)) for _ in range(resamples)]
    low, high = np.percentile(found, CONFIDENCE)
    return float(low), float(high)


def judge_top1(original: Outputs, found: Outputs) -> Score:
    """Share of equal largest elements over the rows of all outputs with at least two elements a row."""
    agreeing, rows = [], []
    for before, after in zip(original, found, strict=True):
        pairs = [(before[name], after[name]) for name in before if before[name].ndim and before[name].shape[-1] > 1]
        for index in range(_count(before)):
            same = [(_sample(x, index).argmax(-1) == _sample(y, index).argmax(-1)) for x, y in pairs]
            agreeing.append(sum(int(np.sum(item)) for item in same))
            rows.append(sum(int(np.size(item)) for item in same))
    total = sum(rows)
    if total == 0:
        raise UsageError("top1 needs an output with at least two elements a row", remedy="use --metric sqnr or cosine")
    share, samples = sum(agreeing) / total, len(rows)
    if max(rows) == 1 or sum(agreeing) == total:
        low, high = wilson(sum(agreeing) if max(rows) == 1 else samples, samples)
        return Score("top1", 1.0, share, 1 - share, 1 - high, 1 - low, samples, "Wilson")
    hits, counts = np.array(agreeing, np.float64), np.array(rows, np.float64)
    low, high = bootstrap(lambda drawn: float(1 - hits[drawn].sum() / counts[drawn].sum()), samples, RESAMPLES)
    return Score("top1", 1.0, share, 1 - share, low, high, samples, "bootstrap over samples")


def judge_sqnr(original: Outputs, found: Outputs) -> Score:
    """1 - noise / signal of the worst output."""
    noise, signal = (
        _energies(original, found, lambda x, y: (x - y) ** 2),
        _energies(original, found, lambda x, y: x * x),
    )

    def drop(drawn: npt.NDArray[np.int64] | slice) -> float:
        return max(
            (float(noise[name][drawn].sum() / max(signal[name][drawn].sum(), 1e-300)) for name in noise), default=0.0
        )

    return _sampled("sqnr", drop, _samples(noise))


def judge_cosine(original: Outputs, found: Outputs) -> Score:
    """Cosine of the worst output."""
    product = _energies(original, found, lambda x, y: x * y)
    first, second = _energies(original, found, lambda x, y: x * x), _energies(original, found, lambda x, y: y * y)

    def drop(drawn: npt.NDArray[np.int64] | slice) -> float:
        worst = 0.0
        for name in product:
            norm = math.sqrt(float(first[name][drawn].sum()) * float(second[name][drawn].sum()))
            worst = max(worst, 1 - float(product[name][drawn].sum()) / norm if norm else 0.0)
        return worst

    return _sampled("cosine", drop, _samples(product))


def judge_script(
    name: str, score: Callable[[Any, Any], Any], labels: Array | None, original: Outputs, found: Outputs
) -> Score:
    """The user's score of both models.

    `outputs` is a dict of arrays with the samples of all batches along axis 0, or lists of one array a batch where
    their shapes differ. The result is a number, or one number a sample, whose mean is the score.

    Raises:
        UsageError: the function fails, or gives something else.
        CalibrationError: fewer labels than samples.
    """
    before, after = _joined(original), _joined(found)
    samples = sum(_count(batch) for batch in original)
    if labels is not None and (labels.ndim == 0 or len(labels) < samples):
        raise CalibrationError("fewer labels than samples", got=f"{labels.shape}, {samples} samples")
    known = None if labels is None else labels[:samples]

    def run(outputs: Any, chosen: Any) -> Floats:
        try:
            result = np.asarray(score(outputs, chosen), np.float64)
        except Exception as error:
            raise UsageError("score() fails", where=name, got=f"{type(error).__name__}: {error}") from error
        if result.ndim > 1 or not result.size or not np.isfinite(result).all():
            raise UsageError("score() gives no finite number, nor one a sample", where=name, got=f"{result.shape}")
        return result

    one, two = run(before, known), run(after, known)
    values = (float(one.mean()), float(two.mean()))
    drop = values[0] - values[1]
    if one.ndim == 1:
        differences = one - two
        if not differences.any() and one.min() >= 0 and one.max() <= 1:  # where none differs a bootstrap sees nothing
            return Score(name, *values, drop, 0.0, 1 - wilson(one.size, one.size)[0], one.size, "Wilson")
        low, high = bootstrap(lambda drawn: float(differences[drawn].mean()), one.size, RESAMPLES)
        return Score(name, *values, drop, low, high, one.size, "paired bootstrap over samples")
    if not all(isinstance(array, np.ndarray) and len(array) == samples for array in before.values()):
        return Score(name, *values, drop, None, None, samples, "its samples cannot be told apart")

    def resampled(drawn: npt.NDArray[np.int64]) -> float:
        chosen = None if known is None else known[drawn]
        parts = [{key: array[drawn] for key, array in outputs.items()} for outputs in (before, after)]
        return float(run(parts[0], chosen)) - float(run(parts[1], chosen))

    low, high = bootstrap(resampled, samples, RESAMPLES_OF_SCRIPTS)
    return Score(name, *values, drop, low, high, samples, "paired bootstrap over samples")


def _sampled(name: str, drop: Callable[[Any], float], samples: int) -> Score:
    low, high = bootstrap(drop, samples, RESAMPLES)
    fallen = drop(slice(None))
    return Score(name, 1.0, 1 - fallen, fallen, low, high, samples, "bootstrap over samples")


def _count(batch: Mapping[str, Array]) -> int:
    """Samples of a batch: what its outputs have along axis 0, 1 when they differ in that."""
    counts = {array.shape[0] if array.ndim else 1 for array in batch.values()}
    return counts.pop() if len(counts) == 1 else 1


def _sample(array: Array, index: int) -> Array:
    """One entry along axis 0; a vector is a single row."""
    return array[index] if array.ndim > 1 else array


def _energies(original: Outputs, found: Outputs, part: Callable[[Floats, Floats], Floats]) -> dict[str, Floats]:
    """Per float output the sum of part(x, y) of every sample, f64 [samples]."""
    sums: dict[str, list[float]] = {}
    for before, after in zip(original, found, strict=True):
        count = _count(before)
        for name, array in before.items():
            if array.dtype.kind != "f":
                continue
            x, y = (np.asarray(item, np.float64).reshape(count, -1) for item in (array, after[name]))
            sums.setdefault(name, []).extend(float(value) for value in part(x, y).sum(axis=1))
    return {name: np.array(values) for name, values in sums.items()}


def _samples(sums: Mapping[str, Floats]) -> int:
    if not sums:
        raise UsageError("the model has no floating-point output to compare", remedy="use --metric top1 or a script")
    return len(next(iter(sums.values())))


def _joined(outputs: Outputs) -> dict[str, Any]:
    """Arrays of all batches along axis 0, or lists of them where their shapes differ."""
    joined: dict[str, Any] = {}
    for name in outputs[0]:
        parts = [batch[name] for batch in outputs]
        same = len({part.shape[1:] for part in parts}) == 1 and parts[0].ndim
        joined[name] = np.concatenate(parts) if same else parts
    return joined
