"""MiniLM sentence vectors: does the cosine of two words' vectors rank pairs of words as people do."""

from __future__ import annotations

from pathlib import Path

import fetch
import numpy as np
import numpy.typing as npt
from tasks import Array, Outputs, Task, joined, made_by
from wordpiece import WordPiece

SETS = ("simlex999.txt", "wordsim353.tsv")  # Hill et al. 2015 (similarity), Finkelstein et al. 2002 (relatedness)
BATCH = 32  # words
CALIBRATION_TEXTS, CALIBRATION_BATCH, CALIBRATION_TOKENS = 64, 8, 48  # beginnings of news articles
TIMED_TOKENS = 128


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Two words and the similarity people gave them, by line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return [(first, second, float(value)) for first, second, value in rows]


def ranks(values: Array) -> Array:
    """Rank of each value, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(rows: Array) -> float:
    """Spearman's rank correlation, times 100, of the pairs of the first set.

    rows: f64 [pairs, 3] of set, cosine, people's similarity.
    """
    return _spearman_of(rows, 0)


def _spearman_of(rows: Array, number: int) -> float:
    chosen = rows[rows[:, 0] == number]
    return 100 * float(np.corrcoef(ranks(chosen[:, 1]), ranks(chosen[:, 2]))[0, 1])


def sentence_encoder() -> Task:
    """Rank correlation with SimLex-999; WordSim-353 in the details."""
    folder, data = fetch.fetch("minilm"), fetch.fetch("data-gensim")
    model = made_by("export_minilm.py", folder / "minilm.onnx", "--models", str(folder))
    tokenizer = WordPiece(folder / "vocab.txt")
    pairs = [(number, *pair) for number, name in enumerate(SETS) for pair in read_pairs(data / name)]
    words = sorted(
        {word for _, *both, _ in pairs for word in both}, key=lambda word: (len(tokenizer.encode(word)), word)
    )
    place = {word: index for index, word in enumerate(words)}

    def feeds(texts: list[str], size: int, length: int = TIMED_TOKENS) -> list[dict[str, npt.NDArray[np.int64]]]:
        return [tokenizer.batch(texts[start : start + size], length) for start in range(0, len(texts), size)]

    def rows(outputs: Outputs) -> Array:
        vectors = joined(outputs, "sentence_embedding").astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = [float(vectors[place[first]] @ vectors[place[second]]) for _, first, second, _ in pairs]
        return np.array([(pair[0], cosine, pair[3]) for pair, cosine in zip(pairs, cosines, strict=True)])

    articles = (data / "lee_background.cor").read_text(encoding="utf-8").splitlines()
    return Task(
        "MiniLM similarity", model, feeds(words, BATCH), tokenizer.batch([articles[-1]], TIMED_TOKENS), rows, spearman,
        "SimLex {:.2f}", calibration=feeds(articles[:CALIBRATION_TEXTS], CALIBRATION_BATCH, CALIBRATION_TOKENS),
        details=lambda rows: {"WordSim-353": _spearman_of(rows, 1)},
    )  # fmt: skip
