"""Byte-pair tokenizer of GPT-2's kind (Sennrich et al., arXiv 1508.07909; Radford et al. 2019), in plain Python.

Text is cut into digits, words with the space before them, runs of other signs, and white space; the bytes of each
piece, written as printable characters, are joined pair by pair in the order of the list of merges.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

# Every digit alone, as SmolLM2 cuts ("pre": "smollm"). Letters are what is a word character but no digit and no "_".
DIGITS = re.compile(r"\d")
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0 to 255 in the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stands_for = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stands_for[byte] for byte in range(256)]


def split_pieces(text: str) -> list[str]:
    """Pieces within which merges happen; together they are the text."""
    pieces: list[str] = []
    position = 0
    for digit in DIGITS.finditer(text):
        pieces += PIECES.findall(text[position : digit.start()])
        pieces.append(digit.group())
        position = digit.end()
    return pieces + PIECES.findall(text[position:])


class BytePair:
    """Tokenizer over a list of tokens (the id is the position) and of merges (`left right`, best first)."""

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        """Keep both as tables."""
        self.ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._characters = byte_characters()
        self._merged = functools.cache(self._merge)

    def _merge(self, piece: str) -> tuple[int, ...]:
        parts = [self._characters[byte] for byte in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return tuple(self.ids[part] for part in parts)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no token is added at its ends."""
        return [index for piece in split_pieces(text) for index in self._merged(piece)]
