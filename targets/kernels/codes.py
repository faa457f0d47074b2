"""The codes of one unit in registers: the packed layout of kbitc/quant/packing.py as TIR, for vectors and scalars.

A word is a uint32 scalar (CUDA, embeddings) or vector of them (CPUs); each of its bytes is a byte of a code vector.
Shifts move words, so that bits cross into neighbouring bytes; the mask that follows removes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from kbitc.quant.packing import STEPS, Piece, per_vector, spare
from kbitc.targets.kernels import vector as v

Expr = Any
ONES = 0x01010101


class UnitCodes:
    """Reads the steps of one unit. Spare vectors are put together when they are first read.

    Args:
        bits: k.
        read: gives the word of vector i, 0 .. k - 1; `any_step` may ask with an expression.
        lanes: uint32 lanes of a word.
    """

    def __init__(self, bits: int, read: Callable[[Any], Expr], lanes: int = 1) -> None:
        self.bits = bits
        self.lanes = lanes
        self._read = read
        self._words: dict[int, Expr] = {}

    def step(self, step: int, shift: int = 0, *, masked: bool = True) -> Expr:
        """The codes of a step, one in each byte, shifted left by `shift`.

        Args:
            masked: clear the other bits; otherwise bits above the code are whatever they are.
        """
        place, codes = self.bits * (step % per_vector(self.bits)), self.vector(step // per_vector(self.bits))
        moved = move(codes, place - shift, self.lanes)
        return moved & self.full(((1 << self.bits) - 1) << shift) if masked and self.bits < STEPS else moved

    def any_step(self, step: Expr, shift: int) -> Expr:
        """As `step` for a step that is known only at run time; words are scalars."""
        count = per_vector(self.bits)
        if spare(self.bits):
            word = self.vector(0)
            for vector in range(1, STEPS // count):
                word = tirx.Select(step >= vector * count, self.vector(vector), word)
        else:
            word = self._read(step // count)
        if self.bits == STEPS:
            return word
        place = tirx.Cast("uint32", step % count) * tirx.const(self.bits, "uint32")
        moved = v.bind(word) >> place if count > 1 else v.bind(word)
        # A code that the shift takes into the next byte does not exist: shift + bits <= 8.
        return move(moved, -shift, 1) & self.full(((1 << self.bits) - 1) << shift)

    def both(self, vector: Expr) -> Expr:
        """A code vector of 4 bits, which holds two steps; the vector may be known only at run time."""
        return self.vector(vector) if isinstance(vector, int) else v.bind(self._read(vector))

    def vector(self, vector: int) -> Expr:
        """A code vector, or a spare one."""
        if vector not in self._words:
            made = self._read(vector) if vector < self.bits else self._spare(spare(self.bits)[vector - self.bits])
            self._words[vector] = v.bind(made)
        return self._words[vector]

    def _spare(self, pieces: tuple[Piece, ...]) -> Expr:
        """Each piece replaces all bits above what was put together before it: one bit select a piece."""
        made: Expr = None
        for piece in pieces:
            moved = move(self.vector(piece.vector), piece.source - piece.target, self.lanes)
            if made is None:
                made = moved
                continue
            below = (1 << piece.target) - 1
            made = (made & self.full(below)) | (moved & self.full(0xFF & ~below))
        return made

    def full(self, byte: int) -> Expr:
        """A word of this byte."""
        return v.full(byte * ONES, "uint32", self.lanes)


def move(word: Expr, down: int, lanes: int) -> Expr:
    """Shift right by `down` bits, left if negative."""
    if down > 0:
        return tirx.shift_right(word, v.full(down, "uint32", lanes))
    return tirx.shift_left(word, v.full(-down, "uint32", lanes)) if down else word
