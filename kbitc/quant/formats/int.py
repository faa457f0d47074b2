"""Signed uniform integers: -2^(k-1) .. 2^(k-1)-1; one bit is the sign, {-1, +1} (XNOR-Net, arXiv 1603.05279)."""

from __future__ import annotations

from kbitc.quant.format import Format


def make(bits: int) -> Format:
    """The k-bit signed integer format."""
    if bits == 1:
        return Format(name="int", bits=1, levels=(-1, 1), uniform=False)
    half = 2 ** (bits - 1)
    return Format(name="int", bits=bits, levels=tuple(range(-half, half)), uniform=True)
