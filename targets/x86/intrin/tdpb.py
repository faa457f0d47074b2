"""tdpbssd, tdpbsud, tdpbusd, tdpbuud (AMX-INT8): a tile of bytes by a tile of bytes, into a tile of int32 sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.targets.x86.intrin import tiles

LETTERS = {True: "s", False: "u"}


def emit(sums: int, left: int, right: int, *, left_signed: bool, right_signed: bool) -> None:
    """sums[m, n] += sum over k, j of left[m, 4 k + j] * right[k, 4 n + j]: tiles by number, no two the same."""
    name = f"tdpb{LETTERS[left_signed]}{LETTERS[right_signed]}d"
    tiles.call(name, *map(tiles.number, (sums, left, right)))


def meaning(sums: npt.NDArray[np.int32], left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """int32 [M, N] + bytes [M, 4 K] by bytes [K, 4 N], modulo 2^32; dtypes int8 or uint8 say how bytes are read."""
    columns = right.reshape(right.shape[0], -1, 4).astype(np.int64).transpose(0, 2, 1).reshape(left.shape[1], -1)
    return np.asarray(sums + left.astype(np.int64) @ columns).astype(np.uint32).astype(np.int32)
