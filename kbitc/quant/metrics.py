"""How far one array is from another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import AccuracyError

Array = npt.NDArray[Any]
# Above this two float32 results are equal for every purpose; JSON has no infinity.
MAX_SQNR = 200.0


@dataclass(frozen=True)
class OutputAccuracy:
    """One output of the model against its reference, over all samples.

    Attributes:
        sqnr_db: 10 log10(sum(reference^2) / sum((reference - value)^2)), at most 200.
        cosine: cosine of the angle between the two, flattened.
        max_error: largest absolute difference.
        top1_agreement: fraction of rows along the last axis whose largest element is the same; None for outputs
            with fewer than two elements a row.
        samples: number of samples compared.
    """

    sqnr_db: float
    cosine: float
    max_error: float
    top1_agreement: float | None
    samples: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return asdict(self)


@dataclass
class _Sums:
    """Running sums of one output; bounded memory whatever the number of samples."""

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    rows: int = 0
    agreeing: int = 0
    samples: int = 0


def compare(
    references: Sequence[Mapping[str, Array]], results: Sequence[Mapping[str, Array]]
) -> dict[str, OutputAccuracy]:
    """Compare two runs of the same samples, output by output.

    Args:
        references: one dict a sample, output name -> array.
        results: the same of the other model; shapes are equal.

    Raises:
        AccuracyError: when a result is not finite where its reference is.
    """
    sums: dict[str, _Sums] = {}
    for reference, result in zip(references, results, strict=True):
        for name, expected in reference.items():
            _add(sums.setdefault(name, _Sums()), name, expected, result[name])
    return {name: _finish(total) for name, total in sums.items()}


def _add(total: _Sums, name: str, expected: Array, found: Array) -> None:
    if expected.shape != found.shape:
        raise AccuracyError("output changed its shape", where=name, got=f"{found.shape}, was {expected.shape}")
    total.samples += 1
    if expected.size == 0:
        return
    x, y = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(x)
    if not np.isfinite(y[finite]).all():
        raise AccuracyError("output is not finite where the original's is", where=name)
    same = ~finite & ((x == y) | (np.isnan(x) & np.isnan(y)))
    if not (finite | same).all():
        raise AccuracyError("output is finite where the original's is not", where=name)
    x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    total.signal += float((x * x).sum())
    total.other += float((y * y).sum())
    total.product += float((x * y).sum())
    total.noise += float(((x - y) ** 2).sum())
    total.worst = max(total.worst, float(np.abs(x - y).max()))
    if x.ndim and x.shape[-1] > 1:
        total.rows += x.size // x.shape[-1]
        total.agreeing += int((x.argmax(-1) == y.argmax(-1)).sum())


def _finish(total: _Sums) -> OutputAccuracy:
    agreement = total.agreeing / total.rows if total.rows else None
    norm = math.sqrt(total.signal) * math.sqrt(total.other)
    cosine = total.product / norm if norm else float(total.signal == total.other)
    return OutputAccuracy(sqnr_db(total.signal, total.noise), cosine, total.worst, agreement, total.samples)


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB from the two energies, clamped to [-200, 200]."""
    if noise == 0:
        return MAX_SQNR
    if signal == 0:
        return -MAX_SQNR
    return max(-MAX_SQNR, min(MAX_SQNR, 10 * math.log10(signal / noise)))
