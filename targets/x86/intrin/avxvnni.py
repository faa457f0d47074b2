"""AVX-VNNI (Alder Lake, Zen 5 and later): vpdpbusd on 16 registers of 8 lanes, for processors without AVX-512."""

from __future__ import annotations

from typing import Any

from kbitc.targets.x86.intrin import fence
from kbitc.targets.x86.intrin.avx512vnni import Avx512Vnni

Expr = Any


class AvxVnni(Avx512Vnni):
    """As `Avx512Vnni`, in half the width: a tile is two registers."""

    name = "avxvnni"
    lanes = 8
    registers = 16
    tiles = 1
    # The second sums of 4 bits would not fit the registers.
    raised_bits = (2, 3)

    def keep_order(self, doubt: Expr) -> None:
        """See `Isa.keep_order`."""
        fence.keep_order(doubt)
