"""What the tables that are fitted to each weight have in common: their first guess and their form."""

from __future__ import annotations

from collections.abc import Sequence

from kbitc.quant.format import Format
from kbitc.quant.formats import nf

PEAK = 127


def first_guess(name: str, bits: int) -> Format:
    """Quantiles of a normal distribution.

    Raises:
        UsageError: as `nf.check_bits`.
    """
    nf.check_bits(name, bits)
    return learned(name, bits, nf.make(bits).levels)


def learned(name: str, bits: int, levels: Sequence[int]) -> Format:
    """The format of a fitted table; `levels` ascend on the int8 grid from -127 to 127."""
    return Format(name, bits, tuple(levels), uniform=False, learned=True, peak=PEAK)
