"""Normal float: levels are quantiles of the standard normal (QLoRA, arXiv 2305.14314, equation 4).

With both halves sharing an exact zero: 2^(k-1) + 1 probabilities on the positive side and 2^(k-1) on the
negative side, the shared zero counted once; the quantiles are divided by their largest absolute value and
rounded to the int8 grid of step 1/127.
"""

from __future__ import annotations

from statistics import NormalDist

from kbitc.errors import UsageError
from kbitc.quant.format import Format

LEVEL_STEPS = 127
# From 8 bits on the quantiles no longer fall on distinct int8 levels.
MAX_BITS = 7


def _quantiles(count: int, highest: float) -> list[float]:
    """Quantiles of the normal at `count` probabilities from `highest` down to, not including, 0.5."""
    step = (highest - 0.5) / count
    return [NormalDist().inv_cdf(highest - i * step) for i in range(count)]


def check_bits(name: str, bits: int) -> None:
    """Refuse a width at which a table of this name makes no sense.

    Raises:
        UsageError: for one bit, where a sign (``int1``) is the same thing, and for 8, where the grid has no room.
    """
    if not 2 <= bits <= MAX_BITS:
        remedy = "use int1" if bits == 1 else "use int8, whose levels are the whole grid"
        raise UsageError(f"a table of {name} has 2 to {MAX_BITS} bits", got=f"{name}{bits}", remedy=remedy)


def make(bits: int) -> Format:
    """The k-bit normal float, k = 2..7.

    Raises:
        UsageError: as `check_bits`.
    """
    check_bits("nf", bits)
    half = 2 ** (bits - 1)
    # QLoRA's reference code cuts the tails at the mean of 1 - 1/(2 * 2^k) and 1 - 1/(2 * (2^k - 1)).
    highest = 1 - (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2
    positive = _quantiles(half, highest)
    negative = [-q for q in _quantiles(half - 1, highest)]
    raw = sorted([*positive, 0.0, *negative])
    peak = max(abs(raw[0]), abs(raw[-1]))
    levels = [round(LEVEL_STEPS * value / peak) for value in raw]
    return Format(name="nf", bits=bits, levels=_distinct(levels), uniform=False)


def _distinct(levels: list[int]) -> tuple[int, ...]:
    """Push equal neighbours apart, outwards from zero, so that every code has a level of its own.

    Only from 7 bits on do neighbouring quantiles round to the same int8 level.
    """
    zero = levels.index(0)
    for i in range(zero + 1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    for i in range(zero - 1, -1, -1):
        levels[i] = min(levels[i], levels[i + 1] - 1)
    return tuple(levels)
