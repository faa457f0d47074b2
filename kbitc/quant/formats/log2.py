"""Powers of two: levels 0 and +-b^-i (LogQuant of Miyashita et al., arXiv 1603.01025, equations 3 and 6).

The base is b = 2^(1/r), text ``log2-4-r1``; the paper has r = 1 and r = 2 (its base sqrt 2). A sign, 2^(k-1) - 1
exponents and zero make 2^k - 1 levels; one code is a second zero. int8 holds seven octaves, that is 7 r exponents:
r = 1 is exact up to 4 bits, and by default r doubles with every bit more, so that the levels span those octaves.
Levels of other bases are rounded half to even to the int8 grid, where small ones may coincide.
"""

from __future__ import annotations

from kbitc.errors import UsageError
from kbitc.quant.format import Format

LARGEST_LEVEL = 127
OCTAVES = 7
ROOTS = (1, 2, 4, 8, 16)


def variants(bits: int) -> tuple[str, ...]:
    """The roots r whose levels stay within the octaves of int8, the widest span first.

    Raises:
        UsageError: for one bit, where a sign (``int1``) is the same thing.
    """
    if not 2 <= bits <= 8:
        raise UsageError("a power of two has 2 to 8 bits", got=f"log2-{bits}", remedy="use int1")
    exponents = 2 ** (bits - 1) - 1
    return tuple(f"r{root}" for root in ROOTS if exponents <= (OCTAVES + 1) * root)


def make(bits: int, variant: str) -> Format:
    """The k-bit logarithmic type of base 2^(1/r)."""
    root = int(variant[1:])
    count = 2 ** (bits - 1) - 1
    top = 2 ** (count - 1) if root == 1 else LARGEST_LEVEL
    levels = [round(top * 2 ** (-i / root)) for i in range(count)]
    return Format("log2", bits, (*(-level for level in levels), 0, 0, *reversed(levels)), uniform=False)
