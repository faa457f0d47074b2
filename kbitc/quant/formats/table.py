"""Any table of levels that a tensor carries: what a quantized ONNX file holds, whoever made it.

`kbitc.graph.quantized` gives the levels it reads; those of `make` only bound them.
"""

from __future__ import annotations

from kbitc.quant.format import Format

LOWEST, HIGHEST = -128, 127


def make(bits: int) -> Format:
    """A stand-in of 2^k levels with the widest reach."""
    count = 2**bits
    levels = tuple(LOWEST + i * (HIGHEST - LOWEST) // (count - 1) for i in range(count))
    return Format("table", bits, levels, uniform=False, learned=True)
