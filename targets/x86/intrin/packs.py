"""vpackssdw and vpackuswb: two registers of whole numbers become one of half the width, saturated.

Both work inside each 128 bits: the numbers of the first register lie in the lower half, those of the second above.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
QUARTER = 16
NAMES = {64: "llvm.x86.avx512.{}.512", 32: "llvm.x86.avx2.{}", 16: "llvm.x86.sse2.{}.128"}


def words(low: Expr, high: Expr, lanes: int) -> Expr:
    """int32 [lanes] twice -> int16 [2 lanes], saturated; 16, 8 or 4 lanes."""
    name = NAMES[4 * lanes].format("packssdw")
    return tirx.op.call_llvm_pure_intrin(v.vector_type("int16", 2 * lanes), name, low, high)


def unsigned_bytes(low: Expr, high: Expr, lanes: int) -> Expr:
    """int16 [2 lanes] twice -> uint8 [4 lanes], saturated."""
    name = NAMES[4 * lanes].format("packuswb")
    return tirx.op.call_llvm_pure_intrin(v.vector_type("uint8", 4 * lanes), name, low, high)


def meaning(low: npt.NDArray[Any], high: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    """Both clipped to the type, in turns of 128 bits."""
    limits = np.iinfo(dtype)
    pieces = [np.clip(side, limits.min, limits.max).astype(dtype) for side in (low, high)]
    size = QUARTER // 2 // np.dtype(dtype).itemsize
    return np.asarray(np.stack([piece.reshape(-1, size) for piece in pieces], axis=1).reshape(-1))
