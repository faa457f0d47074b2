"""Weights of integer graphs: levels that fit int8, without scales, which sit in the requantization behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

WHOLE_BYTES = 8


@dataclass(frozen=True, eq=False)
class LevelTensor:
    """A weight of integers seen as [N, T, C]: level = grid[code], times one factor a block when there are factors.

    Attributes:
        codes: uint8 [N, T, C]. With 8 bits a code is the level itself as a two's complement byte.
        bits: k, 1..8.
        grid: the 2^k levels by code, each in [-128, 127]; empty with 8 bits.
        factors: int8 [N, T, CB], multiplied onto the levels of `block` channels; None for none.
        block: channels of one factor; 0 without factors.
    """

    codes: npt.NDArray[np.uint8]
    bits: int
    grid: tuple[int, ...] = ()
    factors: npt.NDArray[np.int8] | None = None
    block: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, T, C)."""
        n, taps, channels = self.codes.shape
        return n, taps, channels

    def levels(self) -> npt.NDArray[np.int8]:
        """The weight as int8 [N, T, C]."""
        found = self.grid_levels()
        if self.factors is None:
            return found
        spread = np.repeat(self.factors, self.block, axis=2)[:, :, : self.shape[2]]
        return np.asarray(found.astype(np.int32) * spread, np.int8)

    def grid_levels(self) -> npt.NDArray[np.int8]:
        """The weight without its factors, int8 [N, T, C]."""
        if self.bits == WHOLE_BYTES:
            return self.codes.view(np.int8)
        return np.asarray(self.grid, np.int8)[self.codes]

    def whole_bytes(self) -> LevelTensor:
        """The same weight with one byte a level and no factors."""
        return self if self.bits == WHOLE_BYTES and self.factors is None else of_levels(self.levels())

    def seen_as(self, shape: tuple[int, int, int]) -> LevelTensor:
        """The same levels in the same order under another shape; only without factors."""
        return replace(self, codes=np.ascontiguousarray(self.codes).reshape(shape))


def of_levels(levels: npt.NDArray[np.int8]) -> LevelTensor:
    """A weight of int8 [N, T, C] with one byte a level."""
    return LevelTensor(np.ascontiguousarray(levels, np.int8).view(np.uint8), WHOLE_BYTES)
