"""tbl (NEON): look-up in 1 to 4 registers of 16 bytes; an index beyond the table gives 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
REGISTER = 16
MOST_REGISTERS = 4


def emit(registers: list[Expr], indices: Expr) -> Expr:
    """1 to 4 uint8x16 table registers and uint8x16 indices -> uint8x16 entries."""
    name = f"llvm.aarch64.neon.tbl{len(registers)}.v16i8"
    return tirx.op.call_llvm_pure_intrin(v.vector_type("uint8", REGISTER), name, *registers, indices)


def meaning(table: npt.NDArray[np.uint8], indices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """table[index], or 0 where the index is not below len(table) (a multiple of 16, at most 64)."""
    inside = indices < table.size
    return np.asarray(np.where(inside, table[np.where(inside, indices, 0)], 0), dtype=np.uint8)
