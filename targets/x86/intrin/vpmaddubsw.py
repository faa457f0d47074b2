"""vpmaddubsw ymm (AVX2): two products of unsigned by signed bytes, summed into each int16 lane, where it saturates.

It is emitted only where it cannot saturate, whatever the data are: `sums` counts how many results the ends of the
operands let an int16 lane hold, and `emit` refuses operands of which not even one fits. Full bytes do not
(2 * 255 * 128), levels of up to 7 bits by activations in -127 .. 127 do (2 * 127 * 127 = 32258).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.errors import InternalError
from kbitc.targets.kernels import vector as v

Expr = Any
LANES = 16
HIGHEST = 32767


def sums(unsigned: int, signed: int) -> int:
    """How many results fit one int16 lane when added, for bytes of at most this size; 0: not even one does."""
    return HIGHEST // max(1, 2 * unsigned * signed)


def emit(unsigned: Expr, signed: Expr, largest: tuple[int, int]) -> Expr:
    """uint8x32 by int8x32 -> int16x16.

    Args:
        unsigned: the bytes.
        signed: the bytes.
        largest: upper bounds of |unsigned| and |signed|, from what can be fed.

    Raises:
        InternalError: when a sum could saturate.
    """
    if not sums(*largest):
        raise InternalError("vpmaddubsw could saturate", got=f"bytes of up to {largest[0]} by {largest[1]}")
    return tirx.op.call_llvm_pure_intrin(v.vector_type("int16", LANES), "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def meaning(unsigned: npt.NDArray[np.uint8], signed: npt.NDArray[np.int8]) -> npt.NDArray[np.int16]:
    """unsigned[2 n] * signed[2 n] + unsigned[2 n + 1] * signed[2 n + 1], saturated."""
    products = unsigned.astype(np.int64) * signed.astype(np.int64)
    found = products.reshape(-1, 2).sum(axis=1)
    return np.asarray(np.clip(found, -HIGHEST - 1, HIGHEST), dtype=np.int16)
