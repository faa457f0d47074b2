"""AVX-512 with VNNI (Cascade Lake and later, Zen 4): unsigned levels, vpdpbusd, look-ups by vpshufb."""

from __future__ import annotations

from typing import Any

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa
from kbitc.targets.x86.intrin import vpdpbusd, vpshufb
from kbitc.targets.x86.intrin.tables import look_up_bytes, table_registers

Expr = Any


class Avx512Vnni(Isa):
    """32 registers of 16 int32 lanes: a tile is one register."""

    name = "avx512vnni"
    lanes = vpdpbusd.LANES
    registers = 32
    signed = False
    rows = 4
    tiles = 3
    vector_tiles = 4
    raised_bits: tuple[int, ...] = (2, 3, 4)

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`."""
        return table_registers(entries, self.bytes)

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        return look_up_bytes(table, codes, self.bytes, vpshufb.emit)

    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """See `Isa.broadcast`."""
        return (v.reinterpret(v.splat(word, self.lanes), "int8", self.bytes),)

    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """See `Isa.dot`."""
        return vpdpbusd.emit(sums, levels[0], activations[0], self.lanes)
