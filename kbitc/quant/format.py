"""What a k-bit data type is: 2^k integer levels that fit int8, and how a real number finds its level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """A k-bit data type: a code is an index into an ascending grid of int8 levels.

    A real number x is represented as ``scale * grid[code]``, or with a zero point as
    ``scale * (grid[code] - grid[zero_point])``, or with an offset as ``scale * (grid[code] - grid[0]) + offset``.

    Attributes:
        name: family name without the bit width, such as ``int``.
        bits: k, 1 to 8.
        levels: the 2^k levels, ascending, each in [-128, 127]. A level may occur more than once (the two zeros of a
            small float, neighbours that round to the same int8 level); `encode` gives the first of equal ones.
        uniform: levels are consecutive integers, so that no look-up table is needed.
        asymmetric: the format always carries a zero point, or an offset, per scale.
        learned: levels are only a first guess; `kbitc.quant.learn` fits them to a weight.
        peak: level that the largest magnitude of a block gets when its scale is chosen by the largest magnitude;
            0 means the outermost level of its sign.
    """

    name: str
    bits: int
    levels: tuple[int, ...]
    uniform: bool
    asymmetric: bool = False
    learned: bool = False
    peak: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or len(self.levels) != 2**self.bits:
            raise ValueError(f"{self.name}: {len(self.levels)} levels for {self.bits} bits")
        if list(self.levels) != sorted(self.levels) or self.levels[0] < -128 or self.levels[-1] > 127:
            raise ValueError(f"{self.name}{self.bits}: levels must be ascending int8 values")

    @property
    def grid(self) -> npt.NDArray[np.int8]:
        """The levels as int8 [2^bits]."""
        return np.array(self.levels, dtype=np.int8)

    @property
    def largest(self) -> int:
        """Largest magnitude of the integer that stands for a weight: a level, or a difference of two levels."""
        low, high = self.levels[0], self.levels[-1]
        return high - low if self.asymmetric else max(-low, high)

    def scale_for(self, low: FloatArray, high: FloatArray) -> FloatArray:
        """The smallest scales of blocks with values from low <= 0 to high >= 0 that clip nothing; symmetric formats.

        Args:
            low, high: f32 of one shape.

        Returns:
            f32 of that shape, 0 where both are 0.
        """
        below, above = (-self.peak, self.peak) if self.peak else (self.levels[0], self.levels[-1])
        return np.asarray(np.maximum(low / np.float32(below), high / np.float32(above)), np.float32)

    def encode(self, ratio: FloatArray) -> CodeArray:
        """Nearest level of x / scale, half to even between uniform levels, else the lower code.

        Args:
            ratio: f32 of any shape, x in units of the scale.

        Returns:
            Codes, uint8 of the same shape.
        """
        low, high = self.levels[0], self.levels[-1]
        if self.uniform:
            return np.asarray(np.clip(np.rint(ratio), low, high) - low, dtype=np.uint8)
        distinct, first = np.unique(np.array(self.levels, dtype=np.float32), return_index=True)
        middles = (distinct[1:] + distinct[:-1]) / np.float32(2)
        return first.astype(np.uint8)[np.searchsorted(middles, ratio, side="left")]

    def decode(self, codes: CodeArray) -> npt.NDArray[np.int8]:
        """Levels of the codes, int8 of the same shape."""
        return self.grid[codes]
