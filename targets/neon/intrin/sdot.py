"""sdot (Armv8.2 dotprod): four products of signed bytes, summed into each int32 lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
LANES = 4


def emit(sums: Expr, left: Expr, right: Expr) -> Expr:
    """int32x4 sums, int8x16 and int8x16 -> int32x4."""
    return tirx.op.call_llvm_pure_intrin(
        v.vector_type("int32", LANES), "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, left, right
    )


def meaning(
    sums: npt.NDArray[np.int32], left: npt.NDArray[np.int8], right: npt.NDArray[np.int8]
) -> npt.NDArray[np.int32]:
    """sums[n] + sum over j of left[4 n + j] * right[4 n + j], modulo 2^32."""
    products = left.astype(np.int64) * right.astype(np.int64)
    return np.asarray(sums + products.reshape(-1, 4).sum(axis=1)).astype(np.uint32).astype(np.int32)
