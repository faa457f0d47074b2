"""From packed code words to words of four signed levels, the operands of dp4a and mma.

A *code word* is a uint32 whose four bytes are codes; words of two neighbouring steps are treated together, because a
16-entry table look-up by prmt naturally serves the eight codes of one 32-bit register.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kbitc.quant.format import Format
from kbitc.targets.cuda.intrin.prmt import HALF_TABLE, TABLE, prmt, table_words, u32
from kbitc.targets.kernels import isa
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.kernels.isa import Feed, stored_bias

Expr = Any
ONES = 0x01010101
SIGNS = 0x80808080


def feed_of(data_type: Format) -> Feed:
    """The feed of a format: dp4a and mma read signed bytes."""
    return isa.feed_of(data_type, signed=True)


def zero_shift(data_type: Format) -> int:
    """Stored zero point minus the zero point as it is fed."""
    return stored_bias(data_type) - feed_of(data_type).bias


def step_pair(data_type: Format, codes: UnitCodes, pair: Expr) -> tuple[Expr, Expr]:
    """Fed words of steps 2 * pair and 2 * pair + 1 of a unit.

    Args:
        data_type: format of the codes.
        codes: the unit for one channel.
        pair: 0 .. 3, an int or an expression.
    """
    feed = feed_of(data_type)
    if feed.table is not None and data_type.bits == 4:
        return _look_up_16(feed.table, codes.both(pair))
    first, second = _fed(feed, data_type.bits, [_codes(codes, 2 * pair + e, feed.shift) for e in range(2)])
    return first, second


def one_step(data_type: Format, codes: UnitCodes, step: Expr) -> Expr:
    """Fed word of one step, an int or an expression."""
    feed = feed_of(data_type)
    return _fed(feed, data_type.bits, [_codes(codes, step, feed.shift), u32(0)])[0]


def _codes(codes: UnitCodes, step: Expr, shift: int) -> Expr:
    """Four codes of one step, shifted left by `shift`."""
    return v.bind(codes.step(step, shift) if isinstance(step, int) else codes.any_step(step, shift))


def _fed(feed: Feed, bits: int, codes: list[Expr]) -> list[Expr]:
    """Fed words of two code words."""
    if feed.table is None:
        return [word ^ u32(SIGNS) if feed.flip else word for word in codes]
    if bits <= 4:
        return list(_look_up_16(feed.table, v.bind(codes[0] | (codes[1] << u32(4)))))
    return _look_up_tree(feed.table, codes)


def _look_up_16(table: tuple[int, ...], nibbles: Expr) -> tuple[Expr, Expr]:
    """Levels of eight 4-bit codes: the low nibbles of the four bytes, and the high ones.

    prmt takes its selectors from consecutive nibbles, so it looks up (low, high) of two bytes at a time;
    two more prmt sort the results. Bit 3 of a code chooses between the two halves of the table.
    """
    words = [u32(word) for word in table_words(np.array(table, np.uint8).view(np.int8))]
    low_bits = v.bind(nibbles & u32(0x77777777))
    halves = []
    choice = None
    if len(table) > HALF_TABLE:
        choice = v.bind(((nibbles & u32(SIGNS | SIGNS >> 4)) >> u32(1)) | u32(0x32103210))
    for shift in (0, 16):
        selector = low_bits >> u32(shift) if shift else low_bits
        found = prmt(words[0], words[1], selector)
        if choice is not None:
            upper = prmt(words[2], words[3], selector)
            found = prmt(found, upper, choice >> u32(shift) if shift else choice)
        halves.append(v.bind(found))
    return v.bind(prmt(halves[0], halves[1], u32(0x6420))), v.bind(prmt(halves[0], halves[1], u32(0x7531)))


def _look_up_tree(table: tuple[int, ...], codes: list[Expr]) -> list[Expr]:
    """Levels of two words of codes with more than 4 bits: look up 16 entries at a time, choose by the high bits."""
    nibbles = v.bind((codes[0] & u32(0x0F * ONES)) | ((codes[1] & u32(0x0F * ONES)) << u32(4)))
    found = [_look_up_16(table[i : i + TABLE], nibbles) for i in range(0, len(table), TABLE)]
    bit = 4
    while len(found) > 1:
        masks = [v.bind(((word >> u32(bit)) & u32(ONES)) * u32(0xFF)) for word in codes]
        found = [
            tuple(v.bind((high[e] & masks[e]) | (low[e] & ~masks[e])) for e in range(2))
            for low, high in zip(found[0::2], found[1::2], strict=True)
        ]
        bit += 1
    return list(found[0])
