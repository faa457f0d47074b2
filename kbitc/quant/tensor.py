"""A quantized weight: codes, scales, zero points and the grid that gives them meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kbitc.quant.format import Format
from kbitc.quant.scheme import Granularity, QuantScheme

D = TypeVar("D", bound=np.generic)
SCALE_BITS = {"f16": 16, "f32": 32}


@dataclass(frozen=True)
class QTensor:
    """A weight seen as [N, T, C]: output channels, kernel taps, reduction channels.

    Attributes:
        codes: uint8 [N, T, C], each below 2^bits.
        scales: f32 [N, T, CB], [N, 1, 1] (channel) or [1, 1, 1] (tensor), in units of x per level step;
            every value is representable in the scheme's scale type.
        zero_points: uint8 of the shape of scales, the code whose level is the real zero; None when symmetric.
        format: the data type with its levels.
        scheme: how it was made.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    format: Format
    scheme: QuantScheme

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
        """The exact integer of every weight: grid[code] - grid[zero point], int16 [N, T, C] in [-255, 255]."""
        grid = self.format.grid.astype(np.int16)
        integers: npt.NDArray[np.int16] = grid[self.codes]
        if self.zero_points is not None:
            integers = integers - grid[spread(self.zero_points, self.shape, self.scheme)]
        return integers

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, f32 [N, T, C]: one float32 product a weight, as ONNX DequantizeLinear does."""
        integers = self.levels().astype(np.float32)
        return np.asarray(integers * spread(self.scales, self.shape, self.scheme), dtype=np.float32)

    def code_bytes(self) -> int:
        """Bytes of the codes without tile padding: ceil(N * T * C * bits / 8)."""
        return -(-self.codes.size * self.bits // 8)

    def bits_per_weight(self) -> float:
        """Codes, scales and zero points over the number of weights, counted as llama.cpp does."""
        total = self.codes.size * self.bits + self.scales.size * SCALE_BITS[self.scheme.scale_type.value]
        if self.zero_points is not None:
            total += self.zero_points.size * self.bits
        return total / self.codes.size


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
