"""vpmaddubsw ymm (AVX2): two products of unsigned by signed bytes, summed into each int16 lane, where it saturates.

It is emitted only where it cannot saturate, whatever the data are: `sums` counts how many results the ends of the
operands let an int16 lane hold, and `emit` refuses operands of which not even one fits. Full bytes do not
(2 * 255 * 128), levels of up to 7 bits by activations in -127 .. 127 do (2 * 127 * 127 = 32258). Where the signed
bytes are constants, `chain_of` counts from what they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.errors import InternalError
from kbitc.quant.packing import GROUP, STEPS, UNIT
from kbitc.targets.kernels import vector as v

Expr = Any
LANES = 16
HIGHEST = 32767
# Lengths of chains of constants: those that divide a unit.
CHAINS = (8, 4, 2, 1)
# Sums of a channel: one of the first two of its four bytes, one of the others.
PAIRS = 2


def sums(unsigned: int, signed: int) -> int:
    """How many results fit one int16 lane when added, for bytes of at most this size; 0: not even one does."""
    return HIGHEST // max(1, 2 * unsigned * signed)


def chain_of(levels: npt.NDArray[np.int8], largest: int) -> int:
    """How many results in a row may be added in one int16 lane, for signed bytes that are constants; 0: not even one.

    The worst activations of a lane are `largest` where its levels are positive and 0 elsewhere, or the other way
    round. A chain starts with a unit of `packing.UNIT` channels and does not go beyond it.

    Args:
        levels: int8 [N, T, C].
        largest: upper bound of the unsigned bytes, which are not below 0.
    """
    n, taps, channels = levels.shape
    units = -(-channels // UNIT)
    padded = np.zeros((n, taps, units * UNIT), np.int32)
    padded[:, :, :channels] = levels
    steps = padded.reshape(-1, STEPS, PAIRS, GROUP // PAIRS)
    sides = [np.maximum(sign * steps, 0).sum(axis=-1) for sign in (1, -1)]
    for chain in CHAINS:
        starts = np.arange(0, STEPS, chain)
        worst = max(int(np.add.reduceat(side, starts, axis=1).max(initial=0)) for side in sides)
        if worst * largest <= HIGHEST:
            return chain
    return 0


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
