"""Export the MiniLM sentence encoder (BERT, 6 layers, width 384) from torch to ONNX.

    python examples/fetch.py minilm
    python examples/export_minilm.py [--out minilm.onnx] [--opset 20]

The network is written out here in plain torch (Devlin et al., arXiv 1810.04805, post-norm encoder; sentence embedding
as in Reimers & Gurevych, arXiv 1908.10084: mean over the tokens that the mask keeps, scaled to length 1), so neither
transformers nor code from the model's package is needed. Batch and sequence length stay dynamic.

Inputs:  input_ids, attention_mask, token_type_ids   int64 [batch, sequence]
Outputs: last_hidden_state f32 [batch, sequence, 384], sentence_embedding f32 [batch, 384]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    sys.exit("export_minilm: this needs torch: pip install torch==2.13.0 (the CPU build is enough)")
from fetch import models_folder
from safetensors.torch import load_file
from wordpiece import WordPiece

LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
LAYER_NORM_EPSILON = 1e-12
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
MASKED_SCORE = -10000.0  # what BERT adds to the score of a padding token
# Relative to the largest value: 2^-24 a rounding, times the square root of the longest sum (1536 terms), times the
# 6 layers through which errors add up, times 4 for the constant that such estimates leave open.
TOLERANCE = 2.0**-24 * math.sqrt(INNER) * LAYERS * 4
SENTENCES = [
    "The cat sits outside.",
    "A man is playing guitar on the pavement in front of the old bakery.",
    "Quantized weights take a fraction of the memory.",
]


class Attention(nn.Module):
    """Multi-head self-attention with the output projection and its post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPSILON)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: f32 [batch, sequence, width]; bias: f32 [batch, 1, 1, sequence], added to the scores."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + bias, dim=-1)
        return self.norm(self.dense((weights @ v).transpose(1, 2).flatten(2)) + x)


class Layer(nn.Module):
    """One encoder layer: attention, then a two-layer GELU network, each with a residual and a norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPSILON)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: f32 [batch, sequence, width]."""
        x = self.attention(x, bias)
        return self.norm(self.down(nn.functional.gelu(self.up(x))) + x)


class Encoder(nn.Module):
    """Token ids to hidden states and one unit vector a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.segments = nn.Embedding(SEGMENTS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """All three int64 [batch, sequence]; mask 1 = real token."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(position) + self.segments(token_type_ids))
        keep = attention_mask.to(x.dtype)
        bias = (1.0 - keep)[:, None, None, :] * MASKED_SCORE
        for layer in self.layers:
            x = layer(x, bias)
        mean = (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1e-9)
        return x, nn.functional.normalize(mean, dim=-1)


def checkpoint_name(name: str) -> str:
    """Name in the checkpoint of the parameter `name` of `Encoder`."""
    parts = name.split(".")
    if parts[0] in ("words", "positions", "segments"):
        table = {"words": "word", "positions": "position", "segments": "token_type"}[parts[0]]
        return f"embeddings.{table}_embeddings.{parts[1]}"
    if parts[0] == "norm":
        return f"embeddings.LayerNorm.{parts[1]}"
    inside = {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.dense": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }[".".join(parts[2:-1])]
    return f"encoder.layer.{parts[1]}.{inside}.{parts[-1]}"


def load_encoder(weights: Path) -> Encoder:
    """The encoder with the weights of a safetensors checkpoint; every parameter must be there."""
    stored = load_file(weights)
    encoder = Encoder()
    state = {name: stored[checkpoint_name(name)] for name in encoder.state_dict()}
    encoder.load_state_dict(state, strict=True)
    return encoder.eval()


def export(model: nn.Module, out: Path, opset: int, outputs: Sequence[str] = OUTPUTS) -> None:
    """Write a model that takes the encoder's inputs as ONNX, with `batch` and `sequence` dynamic."""
    # Three tensors: one object given twice would become one input used twice.
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in INPUTS)
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=2, max=POSITIONS)
    save_onnx(model, example, ({0: batch, 1: sequence},) * len(INPUTS), INPUTS, outputs, out, opset)


def save_onnx(
    model: nn.Module, example: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...], inputs: Sequence[str],
    outputs: Sequence[str], out: Path, opset: int,
) -> None:  # fmt: skip
    """Write a model as ONNX, weights inside. shapes: for every input its dynamic axes."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every torchvision operator that is missing
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            example,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamic_shapes=shapes,
            dynamo=True,
        )
    if program is None:
        raise SystemExit(f"torch returned no program for {out.name}")
    partial = out.with_suffix(".partial")
    program.save(str(partial), external_data=False)
    os.replace(partial, out)


def largest_difference(encoder: Encoder, model: Path, vocabulary: Path) -> float:
    """Largest |onnxruntime - torch| over the largest |torch|, of both outputs, for a batch and for single sentences."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    tokenizer = WordPiece(vocabulary)
    worst = 0.0
    for texts in (SENTENCES, SENTENCES[:1], SENTENCES[1:2]):
        feeds = tokenizer.batch(texts)
        with torch.no_grad():
            expected = encoder(*(torch.from_numpy(array) for array in feeds.values()))
        for got, want in zip(session.run(None, feeds), expected, strict=True):
            worst = max(worst, float(np.abs(got - want.numpy()).max() / want.abs().max()))
    return worst


def main() -> None:
    """Command line."""
    folder = models_folder() / "minilm"
    parser = argparse.ArgumentParser(description="Export the MiniLM sentence encoder from torch to ONNX.")
    parser.add_argument("--models", type=Path, default=folder, help="folder with the weights and vocab.txt")
    parser.add_argument("--out", type=Path, help="file to write (default: minilm.onnx in that folder)")
    parser.add_argument("--opset", type=int, default=20, choices=(18, 19, 20))
    options = parser.parse_args()
    out: Path = options.out or options.models / "minilm.onnx"
    weights = options.models / "model.safetensors"
    if not weights.is_file():
        raise SystemExit(f"export_minilm: {weights} is missing; run: python examples/fetch.py minilm")
    encoder = load_encoder(weights)
    export(encoder, out, options.opset)
    worst = largest_difference(encoder, out, options.models / "vocab.txt")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opset {options.opset}, onnxruntime against torch {worst:.1e}")
    if not worst < TOLERANCE:
        raise SystemExit("export_minilm: onnxruntime and torch disagree")


if __name__ == "__main__":
    main()
