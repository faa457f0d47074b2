"""WordPiece tokenizer of BERT models, in plain Python: text in, the three int64 inputs of an encoder out.

It follows the published algorithm (Devlin et al., arXiv 1810.04805; greedy longest match first) with the
lower-casing, accent-stripping normaliser that the MiniLM checkpoint was trained with.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAX_CHARACTERS_PER_WORD = 100
CLS, SEP, PAD, UNK = "[CLS]", "[SEP]", "[PAD]", "[UNK]"


def _is_cjk(character: str) -> bool:
    point = ord(character)
    return 0x4E00 <= point <= 0x9FFF or 0x3400 <= point <= 0x4DBF or 0xF900 <= point <= 0xFAFF


def _is_punctuation(character: str) -> bool:
    """ASCII symbols count as punctuation too, as in BERT (`$`, `^`, ... are not in a Unicode P class)."""
    return (character.isascii() and character.isprintable() and not character.isalnum() and character != " ") or (
        unicodedata.category(character).startswith("P")
    )


def split_words(text: str) -> list[str]:
    """Lower case, no accents, no control characters; every punctuation mark and CJK character is a word."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    spaced: list[str] = []
    for character in decomposed:
        category = unicodedata.category(character)
        if category == "Mn":
            continue
        if character.isspace():
            spaced.append(" ")
        elif category.startswith("C") or ord(character) == 0xFFFD:
            continue
        elif _is_punctuation(character) or _is_cjk(character):
            spaced += [" ", character, " "]
        else:
            spaced.append(character)
    return "".join(spaced).split()


class WordPiece:
    """Tokenizer over a `vocab.txt` (one token a line, its id is its line number)."""

    def __init__(self, vocabulary: Path) -> None:
        """Read the vocabulary file; `FileNotFoundError` when it is missing."""
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {token: index for index, token in enumerate(lines)}

    def pieces(self, word: str) -> list[str]:
        """Longest pieces of `word` that are in the vocabulary, `[UNK]` when there are none."""
        if len(word) > MAX_CHARACTERS_PER_WORD:
            return [UNK]
        found: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.ids), None)
            if end is None:
                return [UNK]
            found.append(prefix + word[start:end])
            start = end
        return found

    def encode(self, text: str, max_length: int = 128) -> list[int]:
        """Token ids of one text with `[CLS]` and `[SEP]`, cut to `max_length` ids."""
        tokens = [piece for word in split_words(text) for piece in self.pieces(word)]
        return [self.ids[token] for token in [CLS, *tokens[: max_length - 2], SEP]]

    def batch(self, texts: Sequence[str], max_length: int = 128) -> dict[str, npt.NDArray[np.int64]]:
        """Feeds of an encoder: `input_ids`, `attention_mask`, `token_type_ids`, each int64 [len(texts), longest]."""
        rows = [self.encode(text, max_length) for text in texts]
        shape = (len(rows), max(map(len, rows)))
        ids = np.full(shape, self.ids[PAD], np.int64)
        mask = np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}
