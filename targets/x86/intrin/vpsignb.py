"""vpsignb ymm (AVX2): bytes with the sign of other bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
BYTES = 32


def emit(values: Expr, signs: Expr) -> Expr:
    """int8x32 twice -> int8x32. Of a number and itself it is the size; that of -128 is 128 as an unsigned byte."""
    return tirx.op.call_llvm_pure_intrin(v.vector_type("int8", BYTES), "llvm.x86.avx2.psign.b", values, signs)


def meaning(values: npt.NDArray[np.int8], signs: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """values * sign(signs), modulo 2^8."""
    return np.asarray(values * np.sign(signs), dtype=np.int8)
