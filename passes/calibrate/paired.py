"""Moments of a layer's inputs in the float model and in the model quantized so far, row by row together.

A layer that gets x' in place of x should still give W x. The weight that does so best,

    W* = argmin E|W x - W* x'|^2 + r |W* - W|^2 = W (E[x x'^T] + r) (E[x' x'^T] + r)^-1

is rounded in the place of W (asymmetric calibration; Li et al., "GPTAQ", arXiv 2504.02692), so that each layer makes
up for what those before it lost. Where the bias gives the mean back, x and x' are taken without their means. The
ridge r is K / rows of the mean energy of x', since few rows tell products of different inputs badly, and DAMPING. Where
what earlier layers lost is noise there is nothing to make up for, and W* would fit the samples: so each half of the
batches tells by how much (STRENGTHS) the ridge of the other half's W* is too weak, and at the end W stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.passes.calibrate.moments import (
    CHUNK,
    Reader,
    Sums,
    all_finite,
    in_fixed_order,
    row_limit,
    source_of,
    weights,
)
from kbitc.passes.calibrate.unfold import rows
from kbitc.passes.calibrate.walk import Walk
from kbitc.quant.moments import InputMoments
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]
#: Share of the mean energy that the ridge has at least.
DAMPING = 1e-3
#: Times that the ridge may be taken; beyond all of them W* is W.
STRENGTHS = (1.0, 8.0, 64.0, np.inf)


@dataclass(frozen=True)
class Sample:
    """Moments of some rows: `second` f64 [G, K, K], E[x' x'^T], and `cross` f64 [G, K, K], E[x x'^T]."""

    second: npt.NDArray[np.float64]
    cross: npt.NDArray[np.float64]
    count: int

    def target(self, view: npt.NDArray[np.float64], strength: float) -> npt.NDArray[np.float64]:
        """W* of a weight f64 [G, N / G, K], with so many times the ridge."""
        if strength == np.inf:
            return view
        groups, size = self.second.shape[:2]
        energy = np.trace(self.second, axis1=1, axis2=2) / size
        share = strength * size / self.count + DAMPING
        ridge = np.where(energy > 0, share * energy, 1.0)[:, None, None] * np.eye(size)
        wanted = view @ (self.cross + ridge)
        found = np.linalg.solve(self.second + ridge, wanted.transpose(0, 2, 1))
        return np.asarray(found.transpose(0, 2, 1), np.float64)

    def error(self, view: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> float:
        """E|W x - W* x'|^2 less what does not depend on W*."""
        return float(((found @ self.second - 2 * view @ self.cross) * found).sum())


@dataclass(frozen=True)
class Pair:
    """What is known of the inputs of one weight.

    Attributes:
        inputs: moments of x'; without its mean in `second` where `centred`.
        whole: of all rows, without the means where `centred`.
        halves: of every second batch and of the others; () where there is one batch.
        mean: f64 [G, K], E[x].
        centred: the bias will give the mean back.
    """

    inputs: InputMoments
    whole: Sample
    halves: tuple[Sample, ...]
    mean: npt.NDArray[np.float64]
    centred: bool

    def target(self, weight: FloatArray) -> FloatArray:
        """W* of a weight f32 [N, T, C]."""
        groups, size = self.mean.shape
        view = weight.reshape(groups, -1, size).astype(np.float64)
        return np.asarray(self.whole.target(view, self._strength(view)).reshape(weight.shape), np.float32)

    def _strength(self, view: npt.NDArray[np.float64]) -> float:
        """The strength whose W* from one half of the batches does best on the other half."""
        if not self.halves:
            return STRENGTHS[0]
        folds = self.halves, self.halves[::-1]
        errors = [sum(test.error(view, fit.target(view, each)) for fit, test in folds) for each in STRENGTHS]
        return STRENGTHS[int(np.argmin(errors))]

    def shift(self, weight: FloatArray, tensor: QTensor) -> FloatArray:
        """W E[x] - Wq E[x'], what the mean of each output channel lost, f32 [N]."""
        groups, size = self.mean.shape
        views = (array.reshape(groups, -1, size).astype(np.float64) for array in (weight, tensor.dequantize()))
        means = (self.mean, self.inputs.mean.astype(np.float64))
        before, after = (view @ mean[:, :, None] for view, mean in zip(views, means, strict=True))
        return np.asarray((before - after).reshape(-1), np.float32)


class Walks:
    """The same batches through the float model and through the model quantized so far.

    Args:
        feeds: samples.
    """

    def __init__(self, feeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
        batches = in_fixed_order(feeds)
        self.original, self.quantized, self.batches = Walk(batches), Walk(batches), len(batches)


def paired_moments(
    original: ir.Model, quantized: ir.Model, group: Sequence[Reader], walks: Walks, first: str, *, centred: bool
) -> dict[str, Pair]:
    """Run both models over all batches and give the pairs of a group of weights by name.

    Args:
        original: the float model.
        quantized: the same nodes by name, with the weights of earlier layers quantized.
        group: weights; those that no row reaches are left out.
        walks: over the samples; they go on from one group to the next.
        first: name of the first node of this group and all later ones.
        centred: biases will give back the mean, where one node alone reads the weight.
    """
    there = {node.name: node for node in quantized.graph}
    readers = {reader.key: reader for reader in group}
    sums = {key: (_Sums.zeros(reader), _Sums.zeros(reader)) for key, reader in readers.items()}
    ours = sorted({source_of(node) for reader in group for node in reader.nodes})
    theirs = sorted({source_of(there[node.name]) for reader in group for node in reader.nodes})
    runs = walks.original.run(original, ours, first), walks.quantized.run(quantized, theirs, first)
    for number, (before, after) in enumerate(zip(*runs, strict=True)):
        for key, reader in readers.items():
            limit = row_limit(reader.size, walks.batches)
            for node in reader.nodes:
                value = after[source_of(there[node.name])]
                sums[key][number % 2].add(rows(node, before[source_of(node)], limit), rows(node, value, limit))
    return {
        reader.tensor: _pair(sums[reader.key], centred and len(reader.nodes) == 1)
        for reader in group
        if any(half.after.count for half in sums[reader.key])
    }


@dataclass
class _Sums:
    """Running sums of both sets of rows."""

    after: Sums
    cross: npt.NDArray[np.float64]
    first: npt.NDArray[np.float64]

    @classmethod
    def zeros(cls, reader: Reader) -> _Sums:
        after = Sums.zeros(reader.groups, reader.size)
        return cls(after, np.zeros_like(after.second), np.zeros_like(after.first))

    def add(self, before: FloatArray, after: FloatArray) -> None:
        """Take in rows f32 [G, rows, K] of both models; those that are not finite in either are left out."""
        if not (all_finite(before) and all_finite(after)):
            finite = np.isfinite(before).all(axis=(0, 2)) & np.isfinite(after).all(axis=(0, 2))
            before, after = before[:, finite], after[:, finite]
        shares = np.minimum(weights(before), weights(after))
        self.after.add(after, shares)
        for start in range(0, before.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            counted = before[:, chunk] * shares[chunk, None]
            self.cross += counted.transpose(0, 2, 1) @ after[:, chunk]
            self.first += counted.sum(axis=1, dtype=np.float64)

    def plus(self, other: _Sums) -> _Sums:
        """The sums over the rows of both."""
        return _Sums(self.after.plus(other.after), self.cross + other.cross, self.first + other.first)

    def finish(self, centred: bool) -> tuple[InputMoments, Sample, npt.NDArray[np.float64]]:
        """Moments of x', of both, and E[x]."""
        inputs, cross, mean = self.after.finish(), self.cross / self.after.weight, self.first / self.after.weight
        if centred:
            other = inputs.mean.astype(np.float64)
            centre = other[:, :, None] * other[:, None, :]
            inputs = replace(inputs, second=np.asarray(inputs.second - centre, np.float32))
            cross = cross - mean[:, :, None] * other[:, None, :]
        return inputs, Sample(inputs.second.astype(np.float64), cross, inputs.count), mean


def _pair(halves: Sequence[_Sums], centred: bool) -> Pair:
    inputs, whole, mean = halves[0].plus(halves[1]).finish(centred)
    both = all(half.after.count for half in halves)
    return Pair(inputs, whole, tuple(half.finish(centred)[1] for half in halves) if both else (), mean, centred)
