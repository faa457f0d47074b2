from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wordpiece
from wordpiece import WordPiece, split_words

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "cat",
    "s",
    "##s",
    "##at",
    "c",
    "un",
    "##aff",
    "##able",
    ".",
    "中",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> WordPiece:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return WordPiece(path)


def test_words_are_split_at_punctuation_cjk_and_any_space() -> None:
    assert split_words("The\tCat's  $5 naïve, 中文.") == [
        "the",
        "cat",
        "'",
        "s",
        "$",
        "5",
        "naive",
        ",",
        "中",
        "文",
        ".",
    ]
    assert split_words("zero\u200bwidth \u0000nul \ufffd") == ["zerowidth", "nul"]
    assert split_words(" ") == []


def test_the_longest_piece_wins(tokenizer: WordPiece) -> None:
    assert tokenizer.pieces("cats") == ["cat", "##s"]
    assert tokenizer.pieces("unaffable") == ["un", "##aff", "##able"]
    assert tokenizer.pieces("dog") == ["[UNK]"]
    assert tokenizer.pieces("cat" + "s" * wordpiece.MAX_CHARACTERS_PER_WORD) == ["[UNK]"]


def test_a_batch_is_padded_and_masked(tokenizer: WordPiece) -> None:
    feeds = tokenizer.batch(["The cats.", "the"])
    assert feeds["input_ids"].tolist() == [[2, 4, 5, 7, 13, 3], [2, 4, 3, 0, 0, 0]]
    assert feeds["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert feeds["token_type_ids"].sum() == 0 and {array.dtype for array in feeds.values()} == {np.dtype(np.int64)}


def test_long_texts_are_cut_and_still_end_with_the_separator(tokenizer: WordPiece) -> None:
    assert tokenizer.encode("the " * 50, max_length=8) == [2, *[4] * 6, 3]


def test_ids_of_the_real_vocabulary(models_dir: Callable[[str], Path]) -> None:
    """Ids as the model card's own tokenizer gives them (bert-base-uncased vocabulary)."""
    tokenizer = WordPiece(models_dir("minilm") / "vocab.txt")
    assert tokenizer.encode("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
    assert tokenizer.encode("unaffable") == [101, 14477, 20961, 3468, 102]
