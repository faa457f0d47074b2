"""Each weight on its own: how well it is rounded, what its noise does to the outputs, what keeping it float wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.passes.allocate.choices import Problem, weight_bits
from kbitc.passes.allocate.probe import Probe
from kbitc.quant.metrics import MAX_SQNR, sqnr_db
from kbitc.quant.plan import PlanEntry
from kbitc.quant.tensor import QTensor, spread

BINS = 96
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerAnalysis:
    """One weight that can be quantized.

    Attributes:
        entry: what the analysed plan makes of it.
        weights: number of weights.
        bits_per_weight: codes, scales and zero points.
        alone_db: bits -> SQNR at the outputs in dB when this weight alone has them and all others are float.
        noise: noise to signal at the outputs with this weight alone at the width of the plan.
        exclusion_db: what the outputs win in dB when this weight alone stays float in the plan.
        weight_db: SQNR of the weight itself, measured.
        theory_db: SQNR of the weight if its error were uniform over each step: noise step^2 / 12.
        peak_to_rms: largest magnitude over the root mean square.
        histogram: of the weights in units of their scale.
        levels: the levels of the grid in the same unit.
    """

    entry: PlanEntry
    weights: int
    bits_per_weight: float
    alone_db: Mapping[int, float]
    noise: float
    exclusion_db: float
    weight_db: float
    theory_db: float
    peak_to_rms: float
    histogram: Histogram
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts of `len(counts)` equal bins from low to high."""

    low: float
    high: float
    counts: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {"low": self.low, "high": self.high, "counts": list(self.counts)}


def noise_db(noise: float) -> float:
    """Noise to signal as SQNR in dB, at most 200."""
    return MAX_SQNR if noise <= 0 else max(-MAX_SQNR, min(MAX_SQNR, -10 * math.log10(noise)))


def analyze_layers(
    problem: Problem, tensors: Mapping[str, QTensor], noise: Sequence[Sequence[float]]
) -> tuple[list[LayerAnalysis], float]:
    """Every layer of the problem, and the noise to signal of all weights together.

    Args:
        problem: the layers and the samples.
        tensors: the weights of the analysed plan.
        noise: of every choice alone, from an allocator's `measure` or `estimate`.
    """
    probe = Probe(problem.model, {item.candidate.tensor: item.candidate.kind for item in problem.layers}, problem.feeds)
    names = [layer.candidate.tensor for layer in problem.layers]
    views = {name: tensors[name].dequantize() for name in names if name in tensors}
    everything = probe.noise(views)
    found = []
    for layer, row in zip(problem.layers, noise, strict=True):
        name = layer.candidate.tensor
        if name not in tensors:
            continue
        entry = next(item for item in layer.choices if _bits(item.entry) == tensors[name].bits).entry
        alone = {_bits(choice.entry): noise_db(value) for choice, value in zip(layer.choices, row, strict=True)}
        own = row[[_bits(choice.entry) for choice in layer.choices].index(tensors[name].bits)]
        without = probe.noise({other: view for other, view in views.items() if other != name})
        gain = noise_db(without) - noise_db(everything)
        found.append(_layer(problem.weight(layer), tensors[name], entry, alone, own, gain))
    return found, everything


def _bits(entry: PlanEntry) -> int:
    return 0 if entry.scheme is None else entry.scheme.bits


def _layer(
    weight: FloatArray, tensor: QTensor, entry: PlanEntry, alone: Mapping[int, float], noise: float, gain: float
) -> LayerAnalysis:
    signal = float(np.square(weight, dtype=np.float64).sum())
    error = float(np.square(weight - tensor.dequantize(), dtype=np.float64).sum())
    rms = math.sqrt(signal / weight.size)
    histogram, levels = weight_histogram(weight, tensor)
    return LayerAnalysis(
        entry, weight.size, weight_bits(entry) / weight.size, alone, noise, gain, sqnr_db(signal, error),
        sqnr_db(signal, theoretical_noise(tensor)), float(np.abs(weight).max()) / rms if rms else 0.0,
        histogram, levels,
    )  # fmt: skip


def theoretical_noise(tensor: QTensor) -> float:
    """Sum over the weights of (cell width * scale)^2 / 12: the error of a number that is uniform within its cell.

    A cell reaches half-way to the neighbouring levels; the outermost ones are as wide as their inner half is.
    (Widrow and Kollar, Quantization Noise, equation 5.1, for a step of one.)
    """
    levels = tensor.format.grid.astype(np.float64)
    steps = np.diff(levels)
    widths = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    scales = np.broadcast_to(spread(tensor.scales, tensor.shape, tensor.scheme), tensor.shape)
    return float((np.square(widths)[tensor.codes] * np.square(scales, dtype=np.float64)).sum() / 12)


def weight_histogram(weight: FloatArray, tensor: QTensor) -> tuple[Histogram, tuple[int, ...]]:
    """Weights over their scale (and above their zero point or offset), with the levels of the grid in the same unit."""
    scales = spread(tensor.scales, tensor.shape, tensor.scheme)
    levels = tensor.format.levels
    if tensor.offsets is not None:
        weight = weight - spread(tensor.offsets, tensor.shape, tensor.scheme)
    ratio = weight / np.where(scales == 0, np.float32(1), scales) + (levels[0] if tensor.offsets is not None else 0)
    if tensor.zero_points is not None:
        zeros = tensor.format.grid.astype(np.float32)[tensor.zero_points]
        ratio = ratio + spread(zeros, tensor.shape, tensor.scheme)
    margin = (levels[-1] - levels[0]) / 16
    return count(ratio, levels[0] - margin, levels[-1] + margin), levels


def count(values: npt.NDArray[Any], low: float, high: float) -> Histogram:
    """Histogram of the finite values; what lies outside is counted in the outermost bins."""
    flat = values.reshape(-1)
    flat = np.clip(flat[np.isfinite(flat)], low, high)
    counts, _ = np.histogram(flat, BINS, (low, high if high > low else low + 1))
    return Histogram(float(low), float(high), tuple(int(item) for item in counts))
