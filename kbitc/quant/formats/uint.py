"""Uniform integers with a zero point or an offset per scale (asymmetric).

    scale * (code - zero_point)     Jacob et al., arXiv 1712.05877, equation 1
    scale * code + offset           Q4_1 of ggml; HQQ, whose zero point is a real number (Mobius Labs 2023)

The levels are stored shifted by -2^(k-1) so that they fit int8; the shift cancels against the zero point, or against
the lowest level.
"""

from __future__ import annotations

from kbitc.quant.format import Format


def make(bits: int) -> Format:
    """The k-bit asymmetric integer format."""
    half = 2 ** (bits - 1)
    return Format(name="uint", bits=bits, levels=tuple(range(-half, half)), uniform=True, asymmetric=True)
