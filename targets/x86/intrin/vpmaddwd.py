"""vpmaddwd ymm (AVX2): two products of signed 16-bit numbers, summed into each int32 lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
LANES = 8


def emit(left: Expr, right: Expr) -> Expr:
    """int16x16 by int16x16 -> int32x8. Exact unless all four inputs of a lane are -32768."""
    return tirx.op.call_llvm_pure_intrin(v.vector_type("int32", LANES), "llvm.x86.avx2.pmadd.wd", left, right)


def meaning(left: npt.NDArray[np.int16], right: npt.NDArray[np.int16]) -> npt.NDArray[np.int32]:
    """left[2 n] * right[2 n] + left[2 n + 1] * right[2 n + 1], modulo 2^32."""
    products = left.astype(np.int64) * right.astype(np.int64)
    return np.asarray(products.reshape(-1, 2).sum(axis=1)).astype(np.uint32).astype(np.int32)
