"""Groups that look bytes up in a table of 256: `kernels/byte_table.py` instead of one load a byte."""

from __future__ import annotations

from typing import Any

from kbitc.targets.kernels.byte_table import make_byte_table
from kbitc.targets.rules.base import BYTE_TABLE
from kbitc.targets.target import Target

PrimFunc = Any


def byte_table(function: PrimFunc, target: Target) -> PrimFunc | None:
    """A group marked `kbitc.table`, whose arguments are codes, table, out."""
    if function.attrs is None or BYTE_TABLE not in function.attrs or len(function.params) != 3:
        return None
    return make_byte_table(list(function.params[0].ty.shape), target, "byte_table")
