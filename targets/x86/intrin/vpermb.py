"""vpermb and vpermi2b zmm (AVX512-VBMI): look-up of 64 or 128 bytes; the bits of an index above those do not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
TABLE = 64


def emit(table: Expr, indices: Expr) -> Expr:
    """uint8x64 table and indices -> entries."""
    return tirx.op.call_llvm_pure_intrin(
        v.vector_type("uint8", TABLE), "llvm.x86.avx512.permvar.qi.512", table, indices
    )


def emit_two(low: Expr, high: Expr, indices: Expr) -> Expr:
    """Two uint8x64 tables, entries 0 .. 63 and 64 .. 127, and indices -> entries."""
    return tirx.op.call_llvm_pure_intrin(
        v.vector_type("uint8", TABLE), "llvm.x86.avx512.vpermi2var.qi.512", low, indices, high
    )


def meaning(table: npt.NDArray[np.uint8], indices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """table[index modulo its length], a table of 64 or 128 bytes."""
    return np.asarray(table[indices % table.size], dtype=np.uint8)
