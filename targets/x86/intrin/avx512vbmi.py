"""AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): look-ups of up to 64 bytes by vpermb, of more by vpermi2b.

vpermb ignores the upper bits of an index, so that codes need no mask: with a table of 2^k entries repeated to 64 bytes,
look-up takes the place of the mask that codes without a table need, and a data type of any levels costs no more
than integers do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from kbitc.targets.kernels import vector as v
from kbitc.targets.x86.intrin import vpermb
from kbitc.targets.x86.intrin.avx512vnni import Avx512Vnni

Expr = Any
HIGHEST = 0x80


class Avx512Vbmi(Avx512Vnni):
    """As `Avx512Vnni`, with other look-ups."""

    name = "avx512vbmi"
    ignores_high_bits = True
    # Look-ups and dot products share ports: Zen 4 spreads them better over six tiles, by 3 to 6 % with weights in L3.
    look_up_tiles = 6

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`: one, two or four registers."""
        held = np.array(entries, np.uint8)
        repeated = np.tile(held, max(1, vpermb.TABLE // held.size))
        return [v.bytes_vector(part) for part in repeated.reshape(-1, vpermb.TABLE)]

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        if len(table) == 1:
            return vpermb.emit(table[0], codes)
        found = [vpermb.emit_two(low, high, codes) for low, high in zip(table[0::2], table[1::2], strict=True)]
        if len(found) == 1:
            return found[0]
        upper = codes >= v.full(HIGHEST, "uint8", self.bytes)
        return tirx.Select(upper, v.bind(found[1]), v.bind(found[0]))
