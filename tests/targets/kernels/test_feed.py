"""What is fed to a dot product is the level plus the bias, for every grid of levels and every code."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.quant.format import Format
from kbitc.targets.kernels.isa import feed_of


def _grids(bits: int) -> list[tuple[int, ...]]:
    """Consecutive levels, every second one, and any levels with repetitions."""
    count = 2**bits
    grids = [tuple(range(low, low + count)) for low in {-(count // 2), 0 if bits < 8 else -128, -128}]
    if bits < 8:
        grids += [tuple(range(low, low + 2 * count, 2)) for low in (-128, -count, 127 - 2 * (count - 1))]
    random = np.random.default_rng(bits)
    return [*grids, *(tuple(int(x) for x in np.sort(random.integers(-128, 128, count))) for _ in range(5))]


@pytest.mark.parametrize("bits", range(1, 9))
def test_fed_bytes_are_levels_and_bias(bits: int) -> None:
    codes = np.arange(2**bits)
    for grid in _grids(bits):
        data_type = Format("any", bits, grid, uniform=False)
        for signed in (True, False):
            feed = feed_of(data_type, signed=signed)
            moved = (codes << feed.shift) ^ feed.flip
            fed = (moved if feed.table is None else np.array(feed.table)).astype(np.uint8)
            seen = (fed.view(np.int8) if signed else fed).astype(int)
            np.testing.assert_array_equal(seen, np.array(grid) + feed.bias, err_msg=str((grid, signed)))
