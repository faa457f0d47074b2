"""onnxruntime's fused operators of transformers, opened, give what its own kernels give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kbitc.errors import UnsupportedError
from kbitc.graph.evaluate import evaluate
from kbitc.graph.legality import refuse_unlowerable
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from tests.support.onnx_text import assert_same, noise, proto

BATCH, NEW, PAST, HEADS, SIZE = 2, 3, 4, 4, 8
WIDTH = HEADS * SIZE
RNG = np.random.default_rng(0)
LEFT = np.array([[1, 1, 1], [0, 1, 1]], np.int32)
ANGLES = np.outer(np.arange(16), 10000.0 ** (-np.arange(4) / 4)).astype(np.float32)
TURNS = np.outer(np.arange(16), 10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
FEEDS: dict[str, Any] = {
    "x": noise(BATCH, NEW, WIDTH), "k": noise(BATCH, NEW, WIDTH, seed=1), "v": noise(BATCH, NEW, WIDTH, seed=2),
    "mask": LEFT, "lengths": np.array([3, 2], np.int32), "mask3": np.tril(np.ones((BATCH, NEW, NEW), np.int32)),
    "mask_t": np.array([[1] * 7, [0, 1, 1, 1, 1, 1, 1]], np.int32),
    "past": noise(2, BATCH, HEADS, PAST, SIZE), "pk": noise(BATCH, HEADS, PAST, SIZE),
    "pv": noise(BATCH, HEADS, PAST, SIZE, seed=1), "added": noise(BATCH, HEADS, NEW, NEW),
    "ids": RNG.integers(0, 20, (BATCH, NEW)).astype(np.int32),
    "parts": RNG.integers(0, 2, (BATCH, NEW)).astype(np.int32),
    "at": np.array([[2, 3, 4], [0, 1, 2]], np.int64), "first": np.array([5], np.int64),
    "x4": noise(BATCH, HEADS, NEW, SIZE),
    # onnxruntime groups heads of 16 numbers or more, and continues several tokens of one sequence only.
    "gx": noise(1, NEW, 64), "gk": noise(1, NEW, 32), "gv": noise(1, NEW, 32, seed=1), "gall": noise(1, NEW, 128),
    "gpk": noise(1, 2, PAST, 16), "gpv": noise(1, 2, PAST, 16, seed=1), "last": np.array([PAST + NEW - 1], np.int32),
    "bx": noise(2, NEW, 64), "bk": noise(2, NEW, 32), "bv": noise(2, NEW, 32, seed=1),
    "short": np.full(2, NEW - 1, np.int32), "one": noise(2, 1, 64), "onek": noise(2, 1, 32),
    "onev": noise(2, 1, 32, seed=1), "opk": noise(2, 2, PAST, 16), "opv": noise(2, 2, PAST, 16, seed=1),
    "uneven": np.array([PAST, PAST - 2], np.int32), "lasts": np.full(2, PAST, np.int32),
}  # fmt: skip
WEIGHTS: dict[str, Any] = {
    "w": noise(WIDTH, 3 * WIDTH) / 4, "b": noise(3 * WIDTH), "words": noise(20, WIDTH),
    "places": noise(16, WIDTH, seed=1),
    "kinds": noise(2, WIDTH), "gamma": noise(WIDTH), "beta": noise(WIDTH, seed=1),
    "cos": np.cos(ANGLES), "sin": np.sin(ANGLES), "cos2": np.cos(ANGLES[:, :2]), "sin2": np.sin(ANGLES[:, :2]),
    "gcos": np.cos(TURNS), "gsin": np.sin(TURNS),
    "total": np.array(PAST + NEW, np.int32), "prompt": np.array(NEW, np.int32), "step": np.array(PAST + 1, np.int32),
}  # fmt: skip
H = f"num_heads = {HEADS}"
G = f"num_heads = {HEADS}, kv_num_heads = 2"
CASES = {
    "attention": f"y = com.microsoft.Attention<{H}>(x, w, b)",
    "attention with mask": f"y = com.microsoft.Attention<{H}>(x, w, b, mask)",
    "attention with lengths": f"y = com.microsoft.Attention<{H}, mask_filter_value = -500.0>(x, w, b, lengths)",
    "attention with mask of pairs": f"y = com.microsoft.Attention<{H}>(x, w, b, mask3)",
    "causal attention": f"y = com.microsoft.Attention<{H}, unidirectional = 1, scale = 0.2>(x, w, b)",
    "attention with past": f"y, z = com.microsoft.Attention<{H}, unidirectional = 1>(x, w, b, , past)",
    "attention with past and mask": f"y, z = com.microsoft.Attention<{H}, unidirectional = 1>(x, w, b, mask_t, past)",
    "attention with bias of scores": f"y = com.microsoft.Attention<{H}>(x, w, b, , , added)",
    "heads": f"y = com.microsoft.MultiHeadAttention<{H}>(x, k, v)",
    "heads with bias and mask": f"y = com.microsoft.MultiHeadAttention<{H}>(x, k, v, b, mask)",
    "heads with bias of scores": f"y = com.microsoft.MultiHeadAttention<{H}, scale = 0.3>(x, k, v, , , added)",
    "heads with past": f"y, z, q = com.microsoft.MultiHeadAttention<{H}>(x, k, v, , , , pk, pv)",
    "causal heads": f"y = com.microsoft.MultiHeadAttention<{H}, unidirectional = 1>(x, k, v, b)",
    "cached keys": f"y = com.microsoft.MultiHeadAttention<{H}>(x, pk, pv)",
    "embedding": "y, z = com.microsoft.EmbedLayerNormalization<epsilon = 0.01>"
    "(ids, parts, words, places, kinds, gamma, beta, mask)",
    "embedding without segments": "y, z, q = com.microsoft.EmbedLayerNormalization"
    "(ids, , words, places, , gamma, beta)",
    "rotary": "y = com.microsoft.RotaryEmbedding(x, at, cos, sin)",
    "rotary from a place": "y = com.microsoft.RotaryEmbedding<interleaved = 1>(x, first, cos, sin)",
    "rotary of heads": "y = com.microsoft.RotaryEmbedding(x4, at, cos, sin)",
    "rotary in part": f"y = com.microsoft.RotaryEmbedding<rotary_embedding_dim = 4, {H}>(x, at, cos2, sin2)",
    "groups": f"y, z, q = com.microsoft.GroupQueryAttention<{G}>(gx, gk, gv, gpk, gpv, last, total)",
    "groups of a prompt": f"y, z, q = com.microsoft.GroupQueryAttention<{G}>(bx, bk, bv, , , short, prompt)",
    "rotated groups": f"y, z, q = com.microsoft.GroupQueryAttention<{G}, do_rotary = 1>"
    "(gx, gk, gv, gpk, gpv, last, total, gcos, gsin)",
    "interleaved groups": f"y, z, q = com.microsoft.GroupQueryAttention<{G}, do_rotary = 1, rotary_interleaved = 1>"
    "(gx, gk, gv, gpk, gpv, last, total, gcos, gsin)",
    "packed groups": f"y, z, q = com.microsoft.GroupQueryAttention<{G}, do_rotary = 1, softcap = 5.0>"
    "(gall, , , gpk, gpv, last, total, gcos, gsin)",
    "groups with a window": f"y, z, q = com.microsoft.GroupQueryAttention<{G}, local_window_size = 3>"
    "(gx, gk, gv, gpk, gpv, last, total)",
    "one step": f"y, z, q = com.microsoft.GroupQueryAttention<{G}, do_rotary = 1>"
    "(one, onek, onev, opk, opv, lasts, step, gcos, gsin)",
}  # fmt: skip
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int32): "int32", np.dtype(np.int64): "int64"}


def imported(nodes: str) -> tuple[Any, dict[str, Any]]:
    """The model of a case, and its feeds."""
    names = nodes.split(">(")[-1].split("(")[-1].rstrip(")").replace(" ", "").split(",")
    feeds = {name: FEEDS[name] for name in FEEDS if name in names}
    inputs = ", ".join(f"{KINDS[array.dtype]}{list(array.shape)} {name}" for name, array in feeds.items())
    made = nodes.split(" =", 1)[0].split(", ")
    kinds = ["int32" if name == "z" and "Embed" in nodes else "float" for name in made]
    outputs = ", ".join(f"{kind}[] {name}" for name, kind in zip(made, kinds, strict=True))
    held = {name: array for name, array in WEIGHTS.items() if name in names}
    text = f"g ({inputs}) => ({outputs}) {{ {nodes} }}"
    return load_model(proto(text, held, opset=17, domains=', "com.microsoft" : 1')), feeds


@pytest.mark.parametrize("name", CASES)
def test_opened(name: str) -> None:
    subject, feeds = imported(CASES[name])
    before = evaluate(subject, feeds)
    canonicalize(subject)
    refuse_unlowerable(subject)
    assert not any(node.domain for node in subject.graph)
    assert_same(before, evaluate(subject, feeds), 64)


def test_sequences_of_two_lengths_lie_in_the_cache_without_gaps() -> None:
    """What is behind a sequence's end says nothing."""
    subject, feeds = imported(
        f"y, z, q = com.microsoft.GroupQueryAttention<{G}, do_rotary = 1>"
        "(one, onek, onev, opk, opv, uneven, step, gcos, gsin)"
    )
    before = evaluate(subject, feeds)
    after = evaluate(canonicalize(subject), feeds)
    for found in (before, after):
        for name in "zq":
            found[name][1, :, PAST - 1 :] = 0
    assert_same(before, after, 64)


def test_a_form_without_a_body_is_refused_by_name() -> None:
    subject, _ = imported(f"y = com.microsoft.Attention<{H}, do_rotary = 1>(x, w, b)")
    canonicalize(subject)
    with pytest.raises(UnsupportedError, match="Attention"):
        refuse_unlowerable(subject)
