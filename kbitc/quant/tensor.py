"""A quantized weight: codes, scales, zero points or offsets, and the grid that gives them meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from kbitc.errors import InternalError
from kbitc.quant.format import Format
from kbitc.quant.scales import spread_steps, step_count
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleCode

D = TypeVar("D", bound=np.generic)
FloatArray = npt.NDArray[np.float32]
Fill = Literal["constant", "edge"]
SCALE_BITS = {"f16": 16, "f32": 32}
LEVEL_BITS = 8


@dataclass(frozen=True)
class QTensor:
    """A weight seen as [N, T, C]: output channels, kernel taps, reduction channels.

    Attributes:
        codes: uint8 [N, T, C], each below 2^bits.
        scales: f32 [N, T, CB], [N, 1, 1] (channel) or [1, 1, 1] (tensor), in units of x per level step;
            every value is representable in the scheme's scale type.
        zero_points: uint8 of the shape of scales, the code whose level is the real zero; None when symmetric.
        offsets: f32 of the shape of scales, in units of x, what the lowest level stands for; representable in the
            scheme's scale type. None unless the scheme has them, and then there are no zero points.
        format: the data type with its levels.
        scheme: how it was made.
        scale_steps: where the scheme codes its scales, the steps of which they are multiples
            (`kbitc.quant.scales.store_scales`); else None.

    Raises:
        InternalError: the scales are not multiples of their steps, there are steps without coded scales, or zero
            points or offsets that the scheme does not have.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    format: Format
    scheme: QuantScheme
    scale_steps: npt.NDArray[np.float32] | None = None
    offsets: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.scheme.offset != (self.offsets is not None) or self.scheme.offset and self.zero_points is not None:
            raise InternalError("zero points or offsets do not fit the scheme", where=str(self.scheme))
        coded = self.scheme.scale_code is not ScaleCode.PLAIN
        if coded != (self.scale_steps is not None):
            raise InternalError("steps of scales do not fit the scheme", where=str(self.scheme))
        if self.scale_steps is None:
            return
        codes = self.scale_codes()
        exact = codes * spread_steps(self.scale_steps, self.scales.shape, self.scheme.scale_code) == self.scales
        if not exact.all() or codes.max() > self.scheme.largest_scale_code:
            raise InternalError("scales are not multiples of their steps", where=str(self.scheme))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, T, C)."""
        n, t, c = self.codes.shape
        return n, t, c

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.format.bits

    @property
    def block(self) -> int:
        """Weights along C that share a scale within a tap: the scheme's block, or C when there are no blocks."""
        return self.scheme.block if self.scheme.granularity is Granularity.BLOCK else self.shape[2]

    def levels(self) -> npt.NDArray[np.int16]:
        """The exact integer of every weight, int16 [N, T, C] in [-255, 255].

        That is grid[code] - grid[zero point], with offsets grid[code] - grid[0], which is the code.
        """
        grid = self.format.grid.astype(np.int16)
        integers: npt.NDArray[np.int16] = grid[self.codes]
        if self.zero_points is not None:
            integers = integers - grid[spread(self.zero_points, self.shape, self.scheme)]
        return integers - grid[0] if self.offsets is not None else integers

    def scale_codes(self) -> npt.NDArray[np.uint8]:
        """The codes of coded scales, uint8 of the shape of scales: scale = code * step; 0 only for a scale of 0."""
        if self.scale_steps is None:
            raise InternalError("the scales are not coded", where=str(self.scheme))
        steps = spread_steps(self.scale_steps, self.scales.shape, self.scheme.scale_code)
        return np.asarray(np.rint(self.scales / steps), np.uint8)

    def integer_levels(self) -> npt.NDArray[np.int8]:
        """With integer block scales: level * scale code of every weight, int8 [N, T, C] in [-127, 127].

        The weight is exactly this integer times `scale_steps` [N] of its channel.
        """
        if self.scheme.scale_code is not ScaleCode.INTEGER:
            raise InternalError("block scales are not integers", where=str(self.scheme))
        factors = spread(self.scale_codes().astype(np.int16), self.shape, self.scheme)
        return np.asarray(self.levels() * factors, np.int8)

    def with_plain_scales(self) -> QTensor:
        """The same weights with scales that are not coded; each is exact in the scheme's scale type."""
        if self.scale_steps is None:
            return self
        return replace(self, scheme=replace(self.scheme, scale_code=ScaleCode.PLAIN), scale_steps=None)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, f32 [N, T, C]: one float32 product a weight, as ONNX DequantizeLinear does.

        An offset is added to the rounded product, and the sum rounded.
        """
        values = self.levels().astype(np.float32) * spread(self.scales, self.shape, self.scheme)
        if self.offsets is not None:
            values = values + spread(self.offsets, self.shape, self.scheme)
        return np.asarray(values, dtype=np.float32)

    def code_bytes(self) -> int:
        """Bytes of the codes without tile padding: ceil(N * T * C * bits / 8)."""
        return -(-self.codes.size * self.bits // 8)

    def bits_per_weight(self) -> float:
        """Everything that has to be stored over the number of weights; see `storage_bits`."""
        return storage_bits(self.shape, self.scheme) / self.codes.size


def storage_bits(shape: tuple[int, int, int], scheme: QuantScheme) -> int:
    """Bits of a weight [N, T, C]: codes, scales, zero points or offsets and a learned table, without padding."""
    scales = scale_shape(shape, scheme)
    float_bits = SCALE_BITS[scheme.scale_type.value]
    # Double quantization keeps its few steps in f32.
    step_bits = SCALE_BITS["f32"] if scheme.scale_code is ScaleCode.DOUBLE else float_bits
    total = prod(shape) * scheme.bits
    total += prod(scales) * (scheme.scale_code.bits or float_bits)
    total += step_count(scales, scheme.scale_code) * step_bits
    total += prod(scales) * scheme.bits if scheme.zero_point else 0
    total += prod(scales) * float_bits if scheme.offset else 0
    return total + (LEVEL_BITS * 2**scheme.bits if scheme.data_type().learned else 0)


def shape3(array: npt.NDArray[np.generic]) -> tuple[int, int, int]:
    """(N, T, C) of a three-dimensional array."""
    n, t, c = array.shape
    return n, t, c


def blocks_of(channels: int, scheme: QuantScheme) -> int:
    """CB, the number of scales along C within one tap."""
    return -(-channels // scheme.block) if scheme.granularity is Granularity.BLOCK else 1


def scale_shape(shape: tuple[int, int, int], scheme: QuantScheme) -> tuple[int, int, int]:
    """Shape of the scales of a weight [N, T, C]."""
    n, t, c = shape
    if scheme.granularity is Granularity.TENSOR:
        return 1, 1, 1
    if scheme.granularity is Granularity.CHANNEL:
        return n, 1, 1
    return n, t, blocks_of(c, scheme)


def spread(per_block: npt.NDArray[D], shape: tuple[int, int, int], scheme: QuantScheme) -> npt.NDArray[D]:
    """Repeat one value per scale over the weights it covers: [N, T, CB] -> a view broadcastable to [N, T, C]."""
    if scheme.granularity is not Granularity.BLOCK:
        return per_block
    return np.repeat(per_block, scheme.block, axis=2)[:, :, : shape[2]]


def block_range(weight: FloatArray, scheme: QuantScheme) -> tuple[FloatArray, FloatArray]:
    """min(w, 0) and max(w, 0) of the weights [N, T, C] that share a scale, f32 of the scales' shape."""
    if scheme.granularity is Granularity.BLOCK:
        split = _split_blocks(weight, scheme)
        return split.min(axis=3), split.max(axis=3)
    axes = (0, 1, 2) if scheme.granularity is Granularity.TENSOR else (1, 2)
    zero = np.float32(0)
    return weight.min(axis=axes, keepdims=True, initial=zero), weight.max(axis=axes, keepdims=True, initial=zero)


def block_extent(weight: FloatArray, scheme: QuantScheme) -> tuple[FloatArray, FloatArray]:
    """Smallest and largest of the weights [N, T, C] that share a scale, f32 of the scales' shape."""
    if scheme.granularity is Granularity.BLOCK:
        split = _split_blocks(weight, scheme, "edge")
        return split.min(axis=3), split.max(axis=3)
    axes = (0, 1, 2) if scheme.granularity is Granularity.TENSOR else (1, 2)
    return weight.min(axis=axes, keepdims=True), weight.max(axis=axes, keepdims=True)


def block_sum(values: FloatArray, scheme: QuantScheme) -> FloatArray:
    """Sums of f32 [N, T, C] over the weights that share a scale, f32 of the scales' shape."""
    if scheme.granularity is Granularity.BLOCK:
        return np.asarray(_split_blocks(values, scheme).sum(axis=3), np.float32)
    axes = (0, 1, 2) if scheme.granularity is Granularity.TENSOR else (1, 2)
    return np.asarray(values.sum(axis=axes, keepdims=True), np.float32)


def _split_blocks(weight: FloatArray, scheme: QuantScheme, fill: Fill = "constant") -> FloatArray:
    """[N, T, C] -> [N, T, CB, block], the short last block filled with zeros or ("edge") with the last weight."""
    n, t, c = weight.shape
    count = blocks_of(c, scheme)
    if c != count * scheme.block:
        weight = np.pad(weight, ((0, 0), (0, 0), (0, count * scheme.block - c)), mode=fill)
    return weight.reshape(n, t, count, scheme.block)
