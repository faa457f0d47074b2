"""prmt: pick any four of eight bytes (PTX ISA, "prmt", default mode). With it a 16-entry table is four registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

OPCODE = "PRMT"
BYTES = 4
HALF_TABLE = 8
TABLE = 16


def u32(value: int) -> Any:
    """A uint32 constant."""
    return tirx.const(value & 0xFFFFFFFF, "uint32")


def prmt(low: Any, high: Any, selector: Any) -> Any:
    """Byte i of the result is byte (selector >> 4i) & 7 of high:low; all are uint32 expressions.

    Bit 3 of a selector nibble would repeat the sign bit instead: callers clear it.
    """
    return tirx.call_pure_extern("uint32", "__byte_perm", low, high, selector)


def prmt_means(low: int, high: int, selector: int) -> int:
    """The same for Python ints, with the sign mode."""
    pool = (low & 0xFFFFFFFF).to_bytes(4, "little") + (high & 0xFFFFFFFF).to_bytes(4, "little")
    picked = []
    for i in range(BYTES):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def table_words(table: npt.NDArray[np.int8]) -> list[int]:
    """Up to 16 levels as four little-endian words; missing levels are 0."""
    padded = np.zeros(TABLE, np.int8)
    padded[: table.size] = table
    return [int(word) for word in padded.view("<u4")]
