"""SmolLM2-135M on the Brown corpus: perplexity of the next token, in windows of 256 tokens from all 15 genres."""

from __future__ import annotations

import re
from pathlib import Path

import fetch
import numpy as np
import numpy.typing as npt
from bpe import BytePair
from build_smollm import CONTEXT, GGUF, NAME
from gguf_file import GgufFile
from tasks import Array, Outputs, Task, made_by

GENRES = "abcdefghjklmnpr"
EVALUATED, CALIBRATED = ("01",), ("02", "03", "04", "05")  # texts of each genre that are measured, and that calibrate


def plain_text(tagged: str) -> str:
    """Running text of `word/tag` tokens: quotes as `"`, no space before closing signs; doubled `?`, `!`, `;` once."""
    words = [token.rpartition("/")[0] for token in tagged.split()]
    kept = [word for before, word in zip([None, *words], words, strict=False) if (before, word) not in
            {(sign, sign) for sign in "?!;:"}]  # fmt: skip
    text = " ".join(kept)
    text = re.sub(r"`` ", '"', text)
    text = re.sub(r" ''", '"', text)
    text = re.sub(r"\( ", "(", text)
    return re.sub(r" ([,.;:?!)])", r"\1", text)


def window(path: Path, tokenizer: BytePair, length: int) -> npt.NDArray[np.int64]:
    """The first `length` tokens of a file of the corpus, int64 [1, length]."""
    return np.array([tokenizer.encode(plain_text(path.read_text(encoding="latin-1")))[:length]], np.int64)


def token_losses(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods, in nats, of every token but the first. logits f32 [1, n, v], tokens int64 [1, n]."""
    scores = logits[0, :-1].astype(np.float64)
    top = scores.max(axis=1)
    total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return total - scores[np.arange(len(scores)), tokens[0, 1:]]


def perplexity(rows: Array) -> float:
    """exp of the mean loss. rows: f64 [windows, 3] of loss in nats, tokens, tokens told right."""
    return float(np.exp(rows[:, 0].sum() / rows[:, 1].sum()))


def language_model(windows: int = len(GENRES)) -> Task:
    """Perplexity of the first windows of texts 01 of the genres; texts 02 to 05 calibrate."""
    folder = fetch.fetch("smollm2-135m")
    model = made_by("accuracy/build_smollm.py", folder / NAME.format(CONTEXT))
    metadata = GgufFile(folder / GGUF).metadata
    tokenizer = BytePair(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"])
    corpus = fetch.fetch("data-brown")
    measured, calibrating = (
        [
            {"tokens": window(corpus / f"c{genre}{text}", tokenizer, CONTEXT)}
            for text in texts
            for genre in GENRES[:windows]
        ]
        for texts in (EVALUATED, CALIBRATED)
    )

    def rows(outputs: Outputs) -> Array:
        found = []
        for feeds, output in zip(measured, outputs, strict=True):
            losses = token_losses(output["logits"], feeds["tokens"])
            right = (output["logits"][0, :-1].argmax(axis=1) == feeds["tokens"][0, 1:]).sum()
            found.append((losses.sum(), len(losses), right))
        return np.array(found)

    return Task(
        "SmolLM2 perplexity", model, measured, measured[0], rows, perplexity, "{:.2f}", (f"tokens=1x{CONTEXT}",),
        calibration=calibrating, tables=("token_embd.weight", "output.weight"), better="lower", in_factors=True,
        details=lambda rows: {"top-1, %": 100 * float(rows[:, 2].sum() / rows[:, 1].sum())},
    )  # fmt: skip
