"""Look-ups of 2 to 128 bytes out of vpshufb's 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import select_tree
from kbitc.targets.x86.intrin.vpshufb import TABLE

Expr = Any


def table_registers(entries: tuple[int, ...], width: int) -> list[Expr]:
    """2 to 128 bytes as registers of `width` bytes: 16 entries each, repeated in every 128-bit part."""
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
    # vpshufb answers 0 for an index with bit 7 set and ignores the other high bits. Bit 7 is never set: a format of
    # 8 bits has all 256 levels, so that it is uniform and needs no table.
    return select_tree([v.bind(shuffle(part, codes, width)) for part in table], codes, 4, width)
