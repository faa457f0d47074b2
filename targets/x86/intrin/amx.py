"""AMX-TILE and AMX-INT8 (Sapphire Rapids and later): matrix products of many rows by `kernels/tiled.py`.

Everything else is as with VBMI, which these processors have.
"""

from __future__ import annotations

from kbitc.targets.x86.intrin.avx512vbmi import Avx512Vbmi


class Amx(Avx512Vbmi):
    """As `Avx512Vbmi`, and tile registers."""

    name = "amx"
    tile_registers = True
