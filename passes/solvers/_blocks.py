"""How the weights of a tensor fall into blocks that share a scale, and the scale and zero point search of one block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scales import round_scales
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleCode
from kbitc.quant.tensor import QTensor, blocks_of

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
    """Whether every scale can be chosen for itself; coded scales share a step."""
    return scheme.scale_code is ScaleCode.PLAIN


def signed_scales(data_type: Format, scheme: QuantScheme) -> bool:
    """Whether a block may turn its grid round with a negative scale.

    A two's complement grid reaches one step further below zero than above; which side needs it differs from block to
    block. One scale a channel stays positive: static requantization multiplies by it.
    """
    lopsided = data_type.levels[0] != -data_type.levels[-1]
    free = scheme.granularity is Granularity.BLOCK and searchable(scheme)
    return lopsided and not data_type.asymmetric and free


def store(scales: FloatArray, scheme: QuantScheme) -> FloatArray:
    """Round scales of either sign to their storage type."""
    kept = round_scales(np.abs(scales), scheme.scale_type)
    return np.asarray(np.where(scales < 0, -kept, kept), np.float32)


def to_blocks(array: npt.NDArray[D], scheme: QuantScheme) -> npt.NDArray[D]:
    """[N, T, C] -> [scales, weights a scale], the short last block of a row filled with zeros."""
    n, t, c = array.shape
    if scheme.granularity is Granularity.TENSOR:
        return array.reshape(1, -1)
    if scheme.granularity is Granularity.CHANNEL:
        return array.reshape(n, -1)
    count = blocks_of(c, scheme)
    padded = np.zeros((n, t, count * scheme.block), array.dtype)
    padded[:, :, :c] = array
    return padded.reshape(n * t * count, scheme.block)


def from_blocks(array: npt.NDArray[D], shape: tuple[int, int, int], scheme: QuantScheme) -> npt.NDArray[D]:
    """The inverse of `to_blocks`."""
    n, t, c = shape
    if scheme.granularity is not Granularity.BLOCK:
        return array.reshape(shape)
    return np.ascontiguousarray(array.reshape(n, t, -1)[:, :, :c])


@dataclass
class Fit:
    """Scales and zero points of many blocks with the codes they give.

    Attributes:
        scales: f32 [blocks, 1], storable.
        zeros: f32 [blocks, 1], the level that stands for the real zero; 0 when symmetric.
        codes: uint8 [blocks, L].
        error: f32 [blocks, 1], the weighted squared error.
    """

    scales: FloatArray
    zeros: FloatArray
    codes: CodeArray
    error: FloatArray

    def take(self, other: Fit) -> None:
        """Replace the blocks in which `other` is better."""
        better = other.error < self.error
        for name in ("scales", "zeros", "codes", "error"):
            setattr(self, name, np.where(better, getattr(other, name), getattr(self, name)))


def importance_of(weight: FloatArray, inputs: InputMoments | None) -> FloatArray:
    """E[x^2] of what each weight is multiplied with, f32 [N, T, C]; ones without data."""
    if inputs is None:
        return np.ones_like(weight)
    per_channel = np.repeat(inputs.power, weight.shape[0] // inputs.groups, axis=0)
    return per_channel.reshape(weight.shape)


def start_fit(first: QTensor) -> Fit:
    """The blocks of a tensor; their errors are not known yet."""
    scales = first.scales.reshape(-1, 1)
    zeros = np.zeros_like(scales)
    if first.zero_points is not None:
        zeros = first.format.grid.astype(np.float32)[first.zero_points.reshape(-1, 1)]
    return Fit(scales, zeros, to_blocks(first.codes, first.scheme), np.full_like(scales, np.inf))


def fit_all(weight: FloatArray, importance: FloatArray, first: QTensor) -> QTensor:
    """The best fit of every block, starting from `first`; both arrays f32 [N, T, C]."""
    blocks, weights = to_blocks(weight, first.scheme), to_blocks(importance, first.scheme)
    begin, grid = start_fit(first), first.format.grid.astype(np.float32)
    size = max(1, CHUNK // blocks.shape[1])
    fits = []
    for start in range(0, len(blocks), size):
        part = slice(start, start + size)
        scales, zeros, codes = begin.scales[part], begin.zeros[part], begin.codes[part]
        error = squared_error(blocks[part], weights[part], scales * (grid[codes] - zeros))
        known = Fit(scales, zeros, codes, error)
        fits.append(fit_blocks(blocks[part], weights[part], first.format, first.scheme, known))
    return rebuilt(
        first,
        from_blocks(np.concatenate([fit.codes for fit in fits]), first.shape, first.scheme),
        np.concatenate([fit.scales for fit in fits]),
        np.concatenate([fit.zeros for fit in fits]),
    )


def rebuilt(first: QTensor, codes: CodeArray, scales: FloatArray, zeros: FloatArray) -> QTensor:
    """`first` with other codes [N, T, C], scales and zero levels (as many as `first` has, any shape)."""
    points = first.zero_points
    if points is not None:
        points = np.searchsorted(first.format.grid, zeros.reshape(points.shape)).astype(np.uint8)
    return replace(first, codes=codes, scales=scales.reshape(first.scales.shape), zero_points=points)


def fit_blocks(
    weight: FloatArray, importance: FloatArray, data_type: Format, scheme: QuantScheme, start: Fit | None = None
) -> Fit:
    """Least sum over a block of importance * (w - value)^2, over scales and zero points.

    Args:
        weight: f32 [blocks, L].
        importance: f32 [blocks, L] or [1, L], at least 0.
        data_type: the grid.
        scheme: how scales are stored.
        start: a fit to improve on.
    """
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    every = [trial for factor in FACTORS for trial in trials(factor * low, factor * high, data_type, scheme)]
    best = start or nearest(weight, importance, *every[0], data_type)
    found = np.zeros(best.error.shape, np.bool_)
    for scales, zeros in every:
        error = nearest_error(weight, importance, scales, zeros, data_type)
        better = error < best.error
        best.scales, best.zeros = np.where(better, scales, best.scales), np.where(better, zeros, best.zeros)
        best.error = np.where(better, error, best.error)
        found |= better
    best.codes = np.where(found, encode(weight, best.scales, best.zeros, data_type), best.codes)
    for _ in range(REFINEMENTS):
        levels = data_type.grid.astype(np.float32)[best.codes] - best.zeros
        scales = least_squares(weight, importance, levels, best.scales, scheme)
        best.take(nearest(weight, importance, scales, best.zeros, data_type))
        if data_type.asymmetric:
            for step in (np.float32(-1), np.float32(1)):
                zeros = np.clip(best.zeros + step, data_type.levels[0], data_type.levels[-1])
                best.take(nearest(weight, importance, best.scales, zeros, data_type))
    return best


def trials(
    low: FloatArray, high: FloatArray, data_type: Format, scheme: QuantScheme
) -> list[tuple[FloatArray, FloatArray]]:
    """Scales and zero levels that just cover low <= 0 to high >= 0."""
    bottom, top = np.float32(data_type.levels[0]), np.float32(data_type.levels[-1])
    if data_type.asymmetric:
        scales = store((high - low) / (top - bottom), scheme)
        return [(scales, np.clip(np.rint(bottom - low / scales), bottom, top))]
    none = np.zeros_like(low)
    found = [(store(np.maximum(low / bottom, high / top), scheme), none)]
    if signed_scales(data_type, scheme):
        found.append((store(-np.maximum(-high / bottom, -low / top), scheme), none))
    return found


def least_squares(
    weight: FloatArray, importance: FloatArray, levels: FloatArray, scales: FloatArray,
    scheme: QuantScheme,
) -> FloatArray:  # fmt: skip
    """The scale that fits given levels best, sum(h w q) / sum(h q^2); the old one where that turns its sign."""
    weighted = importance * levels
    product, square = (weighted * weight).sum(1, keepdims=True), (weighted * levels).sum(1, keepdims=True)
    usable = (square > 0) & (product * np.sign(scales) > 0)
    return store(np.where(usable, product / np.where(usable, square, 1), scales).astype(np.float32), scheme)


def nearest(
    weight: FloatArray, importance: FloatArray, scales: FloatArray, zeros: FloatArray, data_type: Format
) -> Fit:
    """Nearest codes for given scales and zero levels, and their error."""
    codes = encode(weight, scales, zeros, data_type)
    value = scales * (data_type.grid.astype(np.float32)[codes] - zeros)
    return Fit(scales, zeros, codes, squared_error(weight, importance, value))


def nearest_error(
    weight: FloatArray, importance: FloatArray, scales: FloatArray, zeros: FloatArray, data_type: Format
) -> FloatArray:
    """The error of `nearest`, to the same bits, without its codes where levels are uniform."""
    if not data_type.uniform:
        return nearest(weight, importance, scales, zeros, data_type).error
    value = np.asarray(weight / np.where(scales == 0, np.float32(1), scales), np.float32)
    value += zeros
    np.clip(np.rint(value, out=value), np.float32(data_type.levels[0]), np.float32(data_type.levels[-1]), out=value)
    value -= zeros
    value *= scales
    np.subtract(weight, value, out=value)
    weighted = importance * value
    weighted *= value
    return np.asarray(weighted.sum(-1, keepdims=True), np.float32)


def encode(weight: FloatArray, scales: FloatArray, zeros: FloatArray, data_type: Format) -> CodeArray:
    """Nearest codes of weights for scales and zero levels that broadcast to them."""
    ratio = weight / np.where(scales == 0, np.float32(1), scales) + zeros
    return data_type.encode(np.asarray(ratio, np.float32))


def squared_error(weight: FloatArray, importance: FloatArray, value: FloatArray) -> FloatArray:
    """sum(importance * (weight - value)^2) along the last axis, kept: f32 [..., 1]."""
    rest = weight - value
    return np.asarray((importance * rest * rest).sum(-1, keepdims=True), np.float32)
