"""Look-ups of 2 to 256 bytes out of vpshufb's 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import select_tree
from kbitc.targets.x86.intrin.vpshufb import TABLE

Expr = Any
HALF = 128 // TABLE  # registers of a table that 7 bits index


def table_registers(entries: tuple[int, ...], width: int) -> list[Expr]:
    """2 to 256 bytes as registers of `width` bytes: 16 entries each, repeated in every 128-bit part."""
    padded = np.zeros(-(-len(entries) // TABLE) * TABLE, np.uint8)
    padded[: len(entries)] = entries
    return [v.bytes_vector(np.tile(part, width // TABLE)) for part in padded.reshape(-1, TABLE)]


def look_up_bytes(table: list[Expr], codes: Expr, width: int, shuffle: Callable[[Expr, Expr, int], Expr]) -> Expr:
    """entries[code] for every byte: one shuffle for each 16 entries, then selection by the high bits of the code.

    Args:
        table: from `table_registers`.
        codes: uint8 vector of `width` lanes, each below the number of entries.
        width: bytes of a register.
        shuffle: `vpshufb.emit`.
    """
    # vpshufb answers 0 for an index with bit 7 set, which only a code of 8 bits has, and ignores the other high bits.
    indices = codes if len(table) <= HALF else v.bind(codes & v.full(TABLE - 1, "uint8", width))
    return select_tree([v.bind(shuffle(part, indices, width)) for part in table], codes, 4, width)
