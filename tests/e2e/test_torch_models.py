"""Small networks as torch users write them, exported with open sizes, built in float, and run at sizes of all kinds.

Weights are random; what is tested is that each construct of the exporter compiles and means what onnxruntime computes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kbitc
from kbitc.graph.evaluate import Session
from kbitc.importer import load_model
from kbitc.passes.verify.accuracy import LOWERING_CEILING_DB
from kbitc.quant.metrics import compare

torch: Any = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.slow
WORDS, WIDTH, HEADS = 50, 32, 4


def heads(x: Any) -> Any:
    return x.reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


class ClassToken(nn.Module):  # type: ignore[misc, name-defined]
    """A vision transformer's start: a learnt token in front of each image's patches, and a layer over them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, image: Any) -> Any:
        x = self.patch(image).flatten(2).transpose(1, 2)
        return self.layer(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))[:, 0]


class Buckets(nn.Module):  # type: ignore[misc, name-defined]
    """Attention with T5's relative positions in logarithmic buckets, and a mask of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, HEADS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, words: Any, mask: Any) -> Any:
        x = self.words(words)
        places = torch.arange(words.shape[1])
        apart = places[None] - places[:, None]
        far = apart.abs()
        large = 8 + (torch.log(far.float() / 8) / math.log(16) * 8).long()
        bucket = (apart > 0).long() * 16 + torch.where(far < 8, far, large.clamp(max=15))
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        away = (1.0 - mask[:, None, None].float()) * -1e9
        scores = q @ k.transpose(-1, -2) + self.bias(bucket).permute(2, 0, 1)[None] + away
        return x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class Cached(nn.Module):  # type: ignore[misc, name-defined]
    """A decoder's step: positions behind the cache, a causal mask, and the cache made longer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(128, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, words: Any, keys: Any, values: Any) -> Any:
        place = torch.arange(keys.shape[2], keys.shape[2] + words.shape[1])
        x = self.words(words) + self.places(place)
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        seen = torch.arange(k.shape[2])[None] <= place[:, None]
        scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, torch.finfo(torch.float32).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape), k, v


class Tagger(nn.Module):  # type: ignore[misc, name-defined]
    """A bidirectional LSTM over sentences of any length, from a zero state of any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.cells = nn.LSTM(WIDTH, 16, batch_first=True, bidirectional=True)

    def forward(self, words: Any) -> Any:
        return self.cells(self.words(words))[0]


class Positions(nn.Module):  # type: ignore[misc, name-defined]
    """A speech encoder's start: strided convolutions, and as many rows of a table as there are frames left."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv1d(8, WIDTH, 3, 1, 1), nn.Conv1d(WIDTH, WIDTH, 3, 2, 1)
        self.register_buffer("table", torch.randn(100, WIDTH))

    def forward(self, frames: Any) -> Any:
        x = nn.functional.gelu(self.far(nn.functional.gelu(self.near(frames)))).transpose(1, 2)
        return x + self.table[: x.shape[1]]


def words(rows: int, length: int) -> Any:
    return torch.from_numpy(np.random.default_rng(length).integers(0, WORDS, (rows, length)))


def noise(*shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def inputs(name: str, rows: int, length: int) -> dict[str, Any]:
    """Inputs of a network for a batch and a length."""
    if name == "ClassToken":
        return {"image": noise(rows, 3, 16, 16)}
    if name == "Positions":
        return {"frames": noise(rows, 8, length)}
    if name == "Buckets":
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, length // 2 + 1 :] = 0
        return {"words": words(rows, length), "mask": mask}
    if name == "Cached":
        cache = noise(rows, HEADS, length - 1, WIDTH // HEADS)
        return {"words": words(rows, length), "keys": cache, "values": cache + 1}
    return {"words": words(rows, length)}


#: Which axes are open, for each rank of an input.
OPEN = {"ClassToken": {4: (0,)}, "Positions": {3: (0, 2)}, "Cached": {2: (0, 1), 4: (0, 2)}}


def exported(name: str, path: Path) -> Path:
    """The network as torch's exporter writes it, batch and length open."""
    torch.manual_seed(0)
    module = globals()[name]().eval()
    given = inputs(name, 2, 12)
    axes = OPEN.get(name, {2: (0, 1)})
    dynamic = tuple(dict.fromkeys(axes[value.ndim], torch.export.Dim.DYNAMIC) for value in given.values())
    torch.onnx.export(
        module, tuple(given.values()), path, input_names=list(given), dynamic_shapes=dynamic, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("name", ["ClassToken", "Buckets", "Cached", "Tagger", "Positions"])
def test_a_network_of_open_sizes_agrees_with_onnxruntime(name: str, tmp_path: Path) -> None:
    model = exported(name, tmp_path / "m.onnx")
    kbitc.compile(model, tmp_path / "m.kbit", scheme="float32")
    module, session = kbitc.load(tmp_path / "m.kbit"), Session(load_model(model))
    for rows, length in ((1, 1), (3, 7), (2, 40)):
        feeds = {key: value.numpy() for key, value in inputs(name, rows, length).items()}
        for output, found in compare([session.run(feeds)], [module(feeds)]).items():
            assert found.sqnr_db >= LOWERING_CEILING_DB, f"{output} of {rows} x {length}"


def test_a_network_of_open_sizes_compiles_at_four_bits(tmp_path: Path) -> None:
    """The compilation holds the module to its quantized ONNX."""
    report = kbitc.compile(exported("ClassToken", tmp_path / "m.onnx"), tmp_path / "m.kbit", bits=4)
    assert len(report.weights) == 5
