"""NEON with dotprod (Cortex-A76, Neoverse N1 and later): signed levels, sdot, look-ups by tbl."""

from __future__ import annotations

from typing import Any

import numpy as np

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Feed, Isa
from kbitc.targets.neon.intrin import sdot, tbl

Expr = Any


class Dotprod(Isa):
    """32 registers of 4 int32 lanes: a tile is four registers."""

    name = "dotprod"
    lanes = sdot.LANES
    registers = 32
    signed = True
    rows = 4
    tiles = 1
    vector_tiles = 2

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`."""
        padded = np.zeros(-(-len(entries) // tbl.REGISTER) * tbl.REGISTER, np.uint8)
        padded[: len(entries)] = entries
        return [v.bytes_vector(row) for row in padded.reshape(-1, tbl.REGISTER)]

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        found: Expr = None
        for start in range(0, len(table), tbl.MOST_REGISTERS):
            # Indices of other parts of the table wrap to beyond this one, where tbl answers 0.
            indices = codes - v.full(start * tbl.REGISTER, "uint8", self.bytes)
            part = tbl.emit(table[start : start + tbl.MOST_REGISTERS], indices)
            found = part if found is None else found | part
        return found

    def split(self, levels: Expr, feed: Feed) -> tuple[Expr, ...]:
        """See `Isa.split`."""
        return (v.bind(v.reinterpret(levels, "int8", self.bytes)),)

    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """See `Isa.broadcast`."""
        return (v.reinterpret(v.splat(word, self.lanes), "int8", self.bytes),)

    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """See `Isa.dot`."""
        return sdot.emit(sums, levels[0], activations[0])
