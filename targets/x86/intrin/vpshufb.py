"""vpshufb (AVX2 ymm, AVX512BW zmm): look-up of 16 bytes, one table for each 128-bit part of the register."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
TABLE = 16
NAMES = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}


def emit(table: Expr, indices: Expr, width: int) -> Expr:
    """uint8 vectors of `width` bytes (32 or 64): table repeated in each 16 bytes, indices -> entries."""
    return tirx.op.call_llvm_pure_intrin(v.vector_type("uint8", width), NAMES[width], table, indices)


def meaning(table: npt.NDArray[np.uint8], indices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """table[16 * (i // 16) + indices[i] % 16], or 0 where bit 7 of the index is set."""
    start = np.arange(indices.size) // TABLE * TABLE
    found = table[start + indices % TABLE]
    return np.asarray(np.where(indices & 0x80, 0, found), dtype=np.uint8)
