"""How the weights of a tensor fall into blocks that share a scale, and the scale and zero point search of one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scales import largest_codes, round_offsets, round_scales, spread_steps
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleCode
from kbitc.quant.tensor import Fill, QTensor, blocks_of

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]
D = TypeVar("D", bound=np.generic)
#: Share of the full range that a searched scale covers.
FACTORS = tuple(np.linspace(1.0, 0.28, 25).astype(np.float32))
#: Least-squares steps after the search.
REFINEMENTS = 2
#: Weights that are searched at once: what stays in the cache.
CHUNK = 1 << 17


def searchable(scheme: QuantScheme) -> bool:
    """Whether every scale can be chosen for itself: any number, or a multiple of the step of its channel."""
    return scheme.scale_code is not ScaleCode.DOUBLE


def signed_scales(data_type: Format, scheme: QuantScheme) -> bool:
    """Whether a block may turn its grid round with a negative scale.

    A two's complement grid reaches one step further below zero than above; which side needs it differs from block to
    block. One scale a channel stays positive: static requantization multiplies by it.
    """
    lopsided = data_type.levels[0] != -data_type.levels[-1]
    free = scheme.granularity is Granularity.BLOCK and scheme.scale_code is ScaleCode.PLAIN
    return lopsided and not data_type.asymmetric and free


def store(scales: FloatArray, scheme: QuantScheme, steps: FloatArray | None = None) -> FloatArray:
    """Round scales of either sign to their storage type, or positive ones to multiples of steps that broadcast."""
    if steps is not None:
        codes = np.clip(np.rint(scales / steps), 1, largest_codes(steps, scheme))
        return np.asarray(codes * steps, np.float32)
    kept = round_scales(np.abs(scales), scheme)
    return np.asarray(np.where(scales < 0, -kept, kept), np.float32)


def to_blocks(array: npt.NDArray[D], scheme: QuantScheme, fill: Fill = "constant") -> npt.NDArray[D]:
    """[N, T, C] -> [scales, weights a scale].

    The short last block of a row is filled with zeros, or ("edge") with its last weight, which widens no range.
    """
    n, t, c = array.shape
    if scheme.granularity is Granularity.TENSOR:
        return array.reshape(1, -1)
    if scheme.granularity is Granularity.CHANNEL:
        return array.reshape(n, -1)
    count = blocks_of(c, scheme)
    padded = np.pad(array, ((0, 0), (0, 0), (0, count * scheme.block - c)), mode=fill)
    return padded.reshape(n * t * count, scheme.block)


def from_blocks(array: npt.NDArray[D], shape: tuple[int, int, int], scheme: QuantScheme) -> npt.NDArray[D]:
    """The inverse of `to_blocks`."""
    n, t, c = shape
    if scheme.granularity is not Granularity.BLOCK:
        return array.reshape(shape)
    return np.ascontiguousarray(array.reshape(n, t, -1)[:, :, :c])


class Affine(NamedTuple):
    """What levels stand for: scales * (level - zeros) + offsets, arrays that broadcast to the levels.

    Attributes:
        scales: f32, storable.
        zeros: f32, the level that stands for the real zero; 0 when symmetric, with offsets the lowest level.
        offsets: f32, storable; None where the scheme has none.
        steps: f32, of which the scales are multiples; None where the scheme does not code them.
    """

    scales: FloatArray
    zeros: FloatArray
    offsets: FloatArray | None = None
    steps: FloatArray | None = None

    @classmethod
    def of(cls, tensor: QTensor) -> Affine:
        """The one of a weight, in the shape of its scales."""
        grid = tensor.format.grid.astype(np.float32)
        zeros = np.full_like(tensor.scales, grid[0] if tensor.offsets is not None else 0)
        if tensor.zero_points is not None:
            zeros = grid[tensor.zero_points]
        steps = tensor.scale_steps
        if steps is not None:
            steps = spread_steps(steps, tensor.scales.shape, tensor.scheme.scale_code)
        return cls(tensor.scales, zeros, tensor.offsets, steps)

    def each(self, function: Callable[[Any], Any]) -> Affine:
        """A function of every array."""
        made: list[Any] = [None if array is None else function(array) for array in self]
        return Affine(*made)

    def where(self, condition: npt.NDArray[np.bool_], other: Affine) -> Affine:
        """`self` where the condition holds, else the other; their steps are the same."""
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = np.where(condition, self.offsets, other.offsets)
        scales = np.where(condition, self.scales, other.scales)
        return Affine(scales, np.where(condition, self.zeros, other.zeros), offsets, self.steps)

    def values(self, levels: FloatArray) -> FloatArray:
        """The weights of levels, rounded as `QTensor.dequantize` does."""
        made = self.scales * (levels - self.zeros)
        return np.asarray(made if self.offsets is None else made + self.offsets, np.float32)

    def above(self, weight: FloatArray) -> FloatArray:
        """The weight above its offset: what scales make of level - zeros."""
        return weight if self.offsets is None else np.asarray(weight - self.offsets, np.float32)

    def ratio(self, weight: FloatArray) -> FloatArray:
        """The level, a real number, that a weight is."""
        made = self.above(weight) / np.where(self.scales == 0, np.float32(1), self.scales) + self.zeros
        return np.asarray(made, np.float32)


@dataclass
class Fit:
    """Scales and zero points of many blocks with the codes they give.

    Attributes:
        affine: arrays of f32 [blocks, 1].
        codes: uint8 [blocks, L].
        error: f32 [blocks, 1], the weighted squared error.
    """

    affine: Affine
    codes: CodeArray
    error: FloatArray

    def take(self, other: Fit) -> None:
        """Replace the blocks in which `other` is better."""
        better = other.error < self.error
        self.affine = other.affine.where(better, self.affine)
        self.codes, self.error = np.where(better, other.codes, self.codes), np.where(better, other.error, self.error)

    def parts(self, size: int) -> Iterator[tuple[slice, Fit]]:
        """The blocks `size` at a time, and where they are."""
        for start in range(0, len(self.codes), size):
            part = slice(start, start + size)
            yield part, Fit(self.affine.each(itemgetter(part)), self.codes[part], self.error[part])


def importance_of(weight: FloatArray, inputs: InputMoments | None) -> FloatArray:
    """E[x^2] of what each weight is multiplied with, f32 [N, T, C]; ones without data."""
    if inputs is None:
        return np.ones_like(weight)
    per_channel = np.repeat(inputs.power, weight.shape[0] // inputs.groups, axis=0)
    return per_channel.reshape(weight.shape)


def start_fit(first: QTensor) -> Fit:
    """The blocks of a tensor; their errors are not known yet."""
    affine = Affine.of(first).each(lambda array: array.reshape(-1, 1))
    return Fit(affine, to_blocks(first.codes, first.scheme), np.full_like(affine.scales, np.inf))


def fit_all(weight: FloatArray, importance: FloatArray, first: QTensor) -> QTensor:
    """The best fit of every block, starting from `first`; both arrays f32 [N, T, C]."""
    blocks, weights = to_blocks(weight, first.scheme, "edge"), to_blocks(importance, first.scheme)
    grid, fits = first.format.grid.astype(np.float32), []
    for part, known in start_fit(first).parts(max(1, CHUNK // blocks.shape[1])):
        known.error = squared_error(blocks[part], weights[part], known.affine.values(grid[known.codes]))
        fits.append(fit_blocks(blocks[part], weights[part], first.format, first.scheme, known))
    return joined(first, fits)


def joined(first: QTensor, fits: list[Fit]) -> QTensor:
    """`first` with the fits of all its blocks in order."""
    codes = from_blocks(np.concatenate([fit.codes for fit in fits]), first.shape, first.scheme)
    scales, zeros = (np.concatenate(arrays) for arrays in zip(*(fit.affine[:2] for fit in fits), strict=True))
    offsets = [fit.affine.offsets for fit in fits if fit.affine.offsets is not None]
    return rebuilt(first, codes, Affine(scales, zeros, np.concatenate(offsets) if offsets else None))


def rebuilt(first: QTensor, codes: CodeArray, affine: Affine) -> QTensor:
    """`first` with other codes [N, T, C], scales and zero levels or offsets (as many as `first` has, any shape)."""
    shape, points = first.scales.shape, first.zero_points
    if points is not None:
        points = np.searchsorted(first.format.grid, affine.zeros.reshape(shape)).astype(np.uint8)
    offsets = None if affine.offsets is None else affine.offsets.reshape(shape)
    return replace(first, codes=codes, scales=affine.scales.reshape(shape), zero_points=points, offsets=offsets)


def fit_blocks(weight: FloatArray, importance: FloatArray, data_type: Format, scheme: QuantScheme, start: Fit) -> Fit:
    """Least sum over a block of importance * (w - value)^2, over scales and zero points or offsets.

    Args:
        weight: f32 [blocks, L], where a block is shorter its last weight again.
        importance: f32 [blocks, L] or [1, L], at least 0, 0 where a block has ended.
        data_type: the grid.
        scheme: how scales are stored.
        start: a fit to improve on, with the steps of its scales; it is changed.
    """
    best, steps = start, start.affine.steps
    every = [trial for factor in FACTORS for trial in trials(*extent(weight, scheme, factor), data_type, scheme, steps)]
    found = np.zeros(best.error.shape, np.bool_)
    for affine in every:
        error = nearest_error(weight, importance, affine, data_type)
        better = error < best.error
        best.affine, best.error = affine.where(better, best.affine), np.where(better, error, best.error)
        found |= better
    best.codes = np.where(found, encode(weight, best.affine, data_type), best.codes)
    for _ in range(REFINEMENTS):
        levels = data_type.grid.astype(np.float32)[best.codes]
        best.take(nearest(weight, importance, refined(weight, importance, levels, best.affine, scheme), data_type))
        if scheme.zero_point:
            for step in (np.float32(-1), np.float32(1)):
                zeros = np.clip(best.affine.zeros + step, data_type.levels[0], data_type.levels[-1])
                best.take(nearest(weight, importance, best.affine._replace(zeros=zeros), data_type))
    return best


def extent(weight: FloatArray, scheme: QuantScheme, share: np.float32) -> tuple[FloatArray, FloatArray]:
    """A share of the range of blocks f32 [blocks, L]: about their mean with offsets, else about 0, which is in it."""
    low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    if not scheme.offset:
        return share * np.minimum(low, 0), share * np.maximum(high, 0)
    middle = weight.mean(1, keepdims=True)
    # The full range is exact, whatever the mean is rounded to.
    rest = np.float32(1) - share
    return share * low + rest * middle, share * high + rest * middle


def trials(
    low: FloatArray, high: FloatArray, data_type: Format, scheme: QuantScheme, steps: FloatArray | None = None
) -> list[Affine]:
    """Scales and zero levels that just cover low <= 0 to high >= 0, or with an offset any range."""
    bottom, top = np.float32(data_type.levels[0]), np.float32(data_type.levels[-1])
    if data_type.asymmetric:
        scales = store((high - low) / (top - bottom), scheme, steps)
        if scheme.offset:
            return [Affine(scales, np.full_like(scales, bottom), round_offsets(low, scheme.scale_type))]
        return [Affine(scales, np.clip(np.rint(bottom - low / scales), bottom, top), steps=steps)]
    none = np.zeros_like(low)
    found = [Affine(store(np.maximum(low / bottom, high / top), scheme, steps), none, steps=steps)]
    if signed_scales(data_type, scheme):
        found.append(Affine(store(-np.maximum(-high / bottom, -low / top), scheme), none))
    return found


def refined(
    weight: FloatArray, importance: FloatArray, levels: FloatArray, affine: Affine, scheme: QuantScheme
) -> Affine:
    """The scales that fit given levels best, together with the offsets where there are some (a line of regression).

    The stored offset is the best one for the stored scale. A scale stays where it would turn its sign.
    """
    if affine.offsets is None:
        return affine._replace(scales=least_squares(weight, importance, levels - affine.zeros, affine, scheme))
    total = np.maximum(importance.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    heights = levels - affine.zeros
    middle, mean = ((importance * array).sum(1, keepdims=True) / total for array in (heights, weight))
    scales = least_squares(weight - mean, importance, heights - middle, affine, scheme)
    return affine._replace(scales=scales, offsets=round_offsets(mean - scales * middle, scheme.scale_type))


def least_squares(
    weight: FloatArray, importance: FloatArray, levels: FloatArray, affine: Affine, scheme: QuantScheme
) -> FloatArray:
    """The scale that fits given levels best, sum(h w q) / sum(h q^2); the old one where that turns its sign."""
    weighted = importance * levels
    product, square = (weighted * weight).sum(1, keepdims=True), (weighted * levels).sum(1, keepdims=True)
    usable = (square > 0) & (product * np.sign(affine.scales) > 0)
    scales = np.where(usable, product / np.where(usable, square, 1), affine.scales).astype(np.float32)
    return store(scales, scheme, affine.steps)


def nearest(weight: FloatArray, importance: FloatArray, affine: Affine, data_type: Format) -> Fit:
    """Nearest codes for given scales and zero levels, and their error."""
    codes = encode(weight, affine, data_type)
    value = affine.values(data_type.grid.astype(np.float32)[codes])
    return Fit(affine, codes, squared_error(weight, importance, value))


def nearest_error(weight: FloatArray, importance: FloatArray, affine: Affine, data_type: Format) -> FloatArray:
    """The error of `nearest`, to the same bits, without its codes where levels are uniform."""
    if not data_type.uniform:
        return nearest(weight, importance, affine, data_type).error
    value = affine.ratio(weight)
    np.clip(np.rint(value, out=value), np.float32(data_type.levels[0]), np.float32(data_type.levels[-1]), out=value)
    value -= affine.zeros
    value *= affine.scales
    if affine.offsets is not None:
        value += affine.offsets
    np.subtract(weight, value, out=value)
    weighted = importance * value
    weighted *= value
    return np.asarray(weighted.sum(-1, keepdims=True), np.float32)


def encode(weight: FloatArray, affine: Affine, data_type: Format) -> CodeArray:
    """Nearest codes of weights for scales and zero levels that broadcast to them."""
    return data_type.encode(affine.ratio(weight))


def squared_error(weight: FloatArray, importance: FloatArray, value: FloatArray) -> FloatArray:
    """sum(importance * (weight - value)^2) along the last axis, kept: f32 [..., 1]."""
    rest = weight - value
    return np.asarray((importance * rest * rest).sum(-1, keepdims=True), np.float32)
