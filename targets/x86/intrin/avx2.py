"""AVX2 (Haswell and later): the dot product of bytes as two vpmaddwd of 16-bit halves, which cannot saturate.

A 16-bit lane of levels holds the bytes of channels 2 i and 2 i + 1. Masking gives the even ones, a shift the odd
ones, both zero-extended; the activations are split alike with their sign. Each vpmaddwd then adds two products
into the lane of the right output channel, so that no horizontal sum is needed.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa
from kbitc.targets.x86.intrin import vpmaddwd, vpshufb
from kbitc.targets.x86.intrin.tables import look_up_bytes, table_registers

Expr = Any
PAIRS = 16


class Avx2(Isa):
    """16 registers of 8 int32 lanes: a tile is two registers."""

    name = "avx2"
    lanes = vpmaddwd.LANES
    registers = 16
    signed = False
    rows = 4
    tiles = 1
    vector_tiles = 4

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`."""
        return table_registers(entries, self.bytes)

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        return look_up_bytes(table, codes, self.bytes, vpshufb.emit)

    def split(self, levels: Expr) -> tuple[Expr, ...]:
        """See `Isa.split`."""
        pairs = v.bind(v.reinterpret(levels, "uint16", PAIRS))
        even = pairs & v.full(0xFF, "uint16", PAIRS)
        odd = tirx.shift_right(pairs, v.full(8, "uint16", PAIRS))
        return v.bind(v.reinterpret(even, "int16", PAIRS)), v.bind(v.reinterpret(odd, "int16", PAIRS))

    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """See `Isa.broadcast`."""
        pairs = v.bind(v.reinterpret(v.splat(word, self.lanes), "int16", PAIRS))
        eight = v.full(8, "int16", PAIRS)
        even = tirx.shift_right(tirx.shift_left(pairs, eight), eight)
        return v.bind(even), v.bind(tirx.shift_right(pairs, eight))

    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """See `Isa.dot`."""
        for level, activation in zip(levels, activations, strict=True):
            sums = sums + vpmaddwd.emit(level, activation)
        return sums
