"""vpdpbusd (AVX512-VNNI, AVX-VNNI): four products of unsigned by signed bytes, summed into each int32 lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
LANES = 16
YMM_LANES = 8


def emit(sums: Expr, unsigned: Expr, signed: Expr, lanes: int = LANES) -> Expr:
    """int32x16 sums, uint8x64 and int8x64 -> int32x16, or 8 or 4 lanes. LLVM 22 types the operands as i8."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return tirx.op.call_llvm_pure_intrin(v.vector_type("int32", lanes), name, sums, unsigned, signed)


def meaning(
    sums: npt.NDArray[np.int32], unsigned: npt.NDArray[np.uint8], signed: npt.NDArray[np.int8]
) -> npt.NDArray[np.int32]:
    """sums[n] + sum over j of unsigned[4 n + j] * signed[4 n + j], modulo 2^32."""
    products = unsigned.astype(np.int64) * signed.astype(np.int64)
    return np.asarray(sums + products.reshape(-1, 4).sum(axis=1)).astype(np.uint32).astype(np.int32)
