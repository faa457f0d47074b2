"""Every hostile file is refused in one line that names the culprit, or computed right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import tests.hostile.external
import tests.hostile.tensor_cases  # noqa: F401
from kbitc.errors import KbitcError
from kbitc.graph.evaluate import evaluate, session_options
from kbitc.graph.legality import after_canonicalize, after_import, refuse_unlowerable
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.canonicalize import canonicalize
from tests.hostile import fuzz
from tests.hostile.cases import ACCEPT, REJECT, good
from tests.support.onnx_text import assert_same


def whole_way(path: Path) -> None:
    """Import, canonicalise, check what can be lowered."""
    subject = load_model(path)
    canonicalize(subject)
    refuse_unlowerable(subject)


@pytest.mark.parametrize("name", REJECT)
def test_refused(name: str, tmp_path: Path) -> None:
    make, words = REJECT[name]
    path = make(tmp_path)
    with pytest.raises(KbitcError) as caught:
        whole_way(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message, message
    assert caught.value.exit_code in (3, 4, 7)


@pytest.mark.parametrize("name", ACCEPT)
def test_computed_right(name: str, tmp_path: Path) -> None:
    path = ACCEPT[name](tmp_path)
    subject = load_model(path)
    assert after_import(subject) == []
    feeds = made_up_feeds(subject)
    session = ort.InferenceSession(str(path), session_options(threads=1))
    wanted = dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
    canonicalize(subject)
    assert after_canonicalize(subject) == []
    refuse_unlowerable(subject)
    assert_same(wanted, evaluate(subject, feeds), terms=8)


def test_nodes_of_one_name(tmp_path: Path) -> None:
    """onnxruntime refuses such a file; kbitc renames the nodes."""
    message = good()
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    wanted = evaluate(load_model(message), {"x": x})
    for node in message.graph.node:
        node.name = "n"
    assert_same(wanted, evaluate(canonicalize(load_model(message)), {"x": x}))


def check_random_graph(seed: int) -> None:
    message = fuzz.random_model(seed)
    session = ort.InferenceSession(message.SerializeToString(), session_options(threads=1))
    subject = load_model(message)
    assert after_import(subject) == []
    canonicalize(subject)
    assert after_canonicalize(subject) == []
    refuse_unlowerable(subject)
    true_batch = int(message.graph.doc_string)
    for batch in (true_batch, true_batch + 2):
        x = np.random.default_rng(seed).standard_normal(fuzz.input_shape(message, batch)).astype(np.float32)
        try:
            found = session.run(None, {"x": x})
        except Exception:
            # A graph that moves N among other dims may hold for its true batch only.
            assert batch != true_batch
            continue
        wanted = dict(zip([item.name for item in session.get_outputs()], found, strict=True))
        # Sums along a path: at most 14 steps of at most 9 * 8 * 8 terms.
        assert_same(wanted, evaluate(subject, {"x": x}), terms=14 * 576)


@pytest.mark.parametrize("block", range(6))
def test_random_graphs(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        check_random_graph(seed)


@pytest.mark.slow
def test_many_random_graphs() -> None:
    for seed in range(1000, 4000):
        check_random_graph(seed)


def check_damaged(data: bytes, seed: int, path: Path) -> bool:
    """Damaged bytes are refused, or still are some model. Returns whether they were refused."""
    path.write_bytes(fuzz.damaged(data, seed))
    try:
        whole_way(path)
    except KbitcError as error:
        assert "\n" not in str(error)
        return True
    return False


def test_damaged_files(tmp_path: Path) -> None:
    data = good().SerializeToString()
    refused = sum(check_damaged(data, seed, tmp_path / "model.onnx") for seed in range(300))
    assert refused > 100


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path) -> None:
    for model in range(20):
        data = fuzz.random_model(model).SerializeToString()
        for seed in range(500):
            check_damaged(data, seed, tmp_path / "model.onnx")


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert fuzz.random_model(7).SerializeToString() == fuzz.random_model(7).SerializeToString()
    assert fuzz.damaged(b"0123456789abcdefghij", 3) == fuzz.damaged(b"0123456789abcdefghij", 3)
