"""Dynamic exponent: the number of leading zeros is a decimal exponent, the rest a linear fraction.

Dynamic tree quantization, Dettmers, arXiv 1511.04561 section 3 and 2110.02861 section 2.2; a data type of 2212.09720.
After the sign, z leading zeros stand for 10^-z, the next set bit ends them, and the remaining k - 2 - z bits choose
one of the middles of 2^(k - 2 - z) equal parts of [0.1, 1]; the two codes left over are 0 and 1.

The values are multiplied by 127 and rounded half to even to the int8 grid. Its two decades hold z = 0 and 1 (and a
little of z = 2), so from 5 bits on some small levels coincide.
"""

from __future__ import annotations

from kbitc.errors import UsageError
from kbitc.quant.format import Format

LARGEST_LEVEL = 127


def make(bits: int) -> Format:
    """The k-bit dynamic exponent type, k = 2..8.

    Raises:
        UsageError: for one bit, where a sign (``int1``) is the same thing.
    """
    if not 2 <= bits <= 8:
        raise UsageError("dynamic exponent has 2 to 8 bits", got=f"dynexp{bits}", remedy="use int1")
    fractions = []
    for zeros in range(bits - 1):
        parts = 2 ** (bits - 2 - zeros)
        fractions += [10.0**-zeros * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    values = sorted([*(-value for value in fractions), 0.0, *fractions, 1.0])
    return Format("dynexp", bits, tuple(round(LARGEST_LEVEL * value) for value in values), uniform=False)
