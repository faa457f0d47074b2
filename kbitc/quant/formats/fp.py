"""Small floats eXmY: a sign, X exponent bits, Y mantissa bits, as in arXiv 2212.09720 (section 2) and OCP MX.

The value of exponent field e and mantissa field m, in units of the smallest subnormal:

    e = 0:  m                  e > 0:  2^(e - 1) * (2^Y + m)

All codes are finite but those that OCP takes for infinity and NaN (fp8-e4m3: the largest code, fp8-e5m2: the largest
exponent), which repeat the largest finite level. The exponent bias cancels against the scale.

The ratio of largest to smallest level is 2^(2^X - 2) * (2^(Y + 1) - 1). Up to 127 the levels are exact (every e1mY,
e2m0 .. e2m4, e3m0). Above it they are divided by the power of two that makes the largest fit int8 and rounded half to
even: levels below about 1/8 of the largest lose mantissa bits and the smallest become 0. Both signs have a zero, so
at least one code is spare.
"""

from __future__ import annotations

from kbitc.errors import UsageError
from kbitc.quant.format import Format

LARGEST_LEVEL = 127
MAX_EXPONENT = 5
# The usual type of each width; where none is usual, the one with the least error on normal weights.
DEFAULTS = {2: "e1m0", 3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e2m3", 7: "e2m4", 8: "e4m3"}
# Codes at the top of the positive half that stand for infinity or NaN.
NOT_FINITE = {"e4m3": 1, "e5m2": 4}


def variants(bits: int) -> tuple[str, ...]:
    """The splits of bits - 1 into exponent and mantissa, the default first.

    Raises:
        UsageError: for one bit, where a sign (``int1``) is the same thing.
    """
    if not 2 <= bits <= 8:
        raise UsageError("a small float has 2 to 8 bits", got=f"fp{bits}", remedy="use int1")
    names = [f"e{x}m{bits - 1 - x}" for x in range(1, min(MAX_EXPONENT, bits - 1) + 1)]
    return tuple(sorted(names, key=lambda name: name != DEFAULTS[bits]))


def make(bits: int, variant: str) -> Format:
    """The small float of the variant, one of `variants(bits)`."""
    magnitudes = _magnitudes(int(variant[1]), int(variant[3]), NOT_FINITE.get(variant, 0) if bits == 8 else 0)
    shift = max(0, magnitudes[-1].bit_length() - LARGEST_LEVEL.bit_length())
    levels = [round(value / 2**shift) for value in magnitudes]
    return Format(name="fp", bits=bits, levels=(*(-level for level in reversed(levels)), *levels), uniform=False)


def _magnitudes(exponent_bits: int, mantissa_bits: int, not_finite: int) -> list[int]:
    """The 2^(X + Y) values of the positive half, ascending, in units of the smallest subnormal."""
    steps = 2**mantissa_bits
    values = list(range(steps))
    for exponent in range(1, 2**exponent_bits):
        values += [2 ** (exponent - 1) * (steps + mantissa) for mantissa in range(steps)]
    finite = values[: len(values) - not_finite]
    return finite + [finite[-1]] * not_finite
