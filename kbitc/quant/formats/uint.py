"""Uniform integers with a zero point per scale (asymmetric): real value = scale * (code - zero_point).

The levels are stored shifted by -2^(k-1) so that they fit int8; the shift cancels against the zero point.
"""

from __future__ import annotations

from kbitc.quant.format import Format


def make(bits: int) -> Format:
    """The k-bit asymmetric integer format."""
    half = 2 ** (bits - 1)
    return Format(name="uint", bits=bits, levels=tuple(range(-half, half)), uniform=True, asymmetric=True)
