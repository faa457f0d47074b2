"""Operators of the standard that have no body there, opened, give what onnxruntime's own kernels give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kbitc.errors import UnsupportedError
from kbitc.graph.evaluate import evaluate
from kbitc.graph.legality import refuse_unlowerable
from kbitc.importer import load_model
from kbitc.passes.allocate.survey import survey
from kbitc.passes.canonicalize import canonicalize
from tests.support.lowered import run_of
from tests.support.onnx_text import assert_same, noise, proto

# Between -1.3 and 1.3: a part of the places lies outside the image.
PLACES = (noise(2, 4, 5, 2) / 2.5).clip(-1.3, 1.3)
FEEDS: dict[str, Any] = {
    "x": noise(2, 3, 6, 7), "grid": PLACES, "steps": noise(5, 3, 4), "flat": noise(3, 5),
    "signal": noise(2, 40), "column": noise(2, 40, 1), "real": noise(2, 12, 3, 1), "complex": noise(2, 12, 3, 2),
    "lengths": np.array([1, 5, 3]),
}  # fmt: skip
WEIGHTS: dict[str, Any] = {
    "hop": np.array(4), "size": np.array(16), "window": np.hanning(16).astype(np.float32), "n": np.array(9),
    "longer": np.array(15), "axis": np.array(1), "first": np.array(0),
}  # fmt: skip
SAMPLES = {
    f"{mode} {padding} {corners}":
    f'y = GridSample<mode = "{mode}", padding_mode = "{padding}", align_corners = {corners}>(x, grid)'
    for mode in ("bilinear", "nearest") for padding in ("zeros", "border", "reflection") for corners in (0, 1)
}  # fmt: skip
CASES = {
    **SAMPLES,
    "reversed in time": "y = ReverseSequence(steps, lengths)",
    "reversed rows": "y = ReverseSequence<batch_axis = 0, time_axis = 1>(flat, lengths)",
    "frames": "y = STFT(signal, hop, , size)",
    "frames with a window": "y = STFT(column, hop, window)",
    "all bins": "y = STFT<onesided = 0>(signal, hop, window, size)",
    "waves": "y = DFT<axis = 1>(real)",
    "half of the waves": "y = DFT<axis = 1, onesided = 1>(real)",
    "fewer waves": "y = DFT<axis = 1>(complex, n)",
    "more waves": "y = DFT<axis = 1>(complex, longer)",
    "waves back": "y = DFT<axis = 1, inverse = 1>(complex)",
    "waves of rows": "y = DFT<axis = 0>(complex)",
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
# Terms of the longest sum: 2 by 15 for complex numbers.
TERMS = 64


def imported(nodes: str, *, symbolic: bool = False) -> tuple[Any, dict[str, Any]]:
    """The model of a case, and its feeds."""
    names = nodes.split(">(")[-1].split("(")[-1].rstrip(")").replace(" ", "").split(",")
    feeds = {name: FEEDS[name] for name in FEEDS if name in names}

    def shape(name: str) -> str:
        dims = FEEDS[name].shape
        return str([f"{name}{axis}" for axis in range(len(dims))] if symbolic else list(dims)).replace("'", "")

    inputs = ", ".join(f"{KINDS[array.dtype]}{shape(name)} {name}" for name, array in feeds.items())
    held = {name: array for name, array in WEIGHTS.items() if name in names}
    return load_model(proto(f"g ({inputs}) => (float[] y) {{ {nodes} }}", held, opset=17)), feeds


@pytest.mark.parametrize("name", CASES)
def test_opened(name: str) -> None:
    subject, feeds = imported(CASES[name])
    before = evaluate(subject, feeds)
    canonicalize(subject)
    refuse_unlowerable(subject)
    assert_same(before, evaluate(subject, feeds), TERMS)


@pytest.mark.parametrize("name", ["bilinear zeros 0", "nearest reflection 1", "reversed in time", "frames"])
def test_opened_at_open_sizes_and_compiled(name: str) -> None:
    subject, feeds = imported(CASES[name], symbolic=name != "frames")
    before = evaluate(subject, feeds)
    found = run_of(canonicalize(subject))(feeds)
    assert_same(before, dict(zip(before, found, strict=True)), TERMS)


def test_an_absent_onesided_means_half_of_the_bins_for_all_that_follows() -> None:
    text = """g (float[2, 40] signal) => (float[] y) {
        spectrum = STFT(signal, hop, window)
        energy = ReduceSumSquare<axes = [-1], keepdims = 0>(spectrum)
        y = MatMul(energy, bank)
    }"""
    subject = load_model(
        proto(text, {"hop": WEIGHTS["hop"], "window": WEIGHTS["window"], "bank": noise(9, 3)}, opset=17)
    )
    feeds = {"signal": FEEDS["signal"]}
    before = evaluate(subject, feeds)
    assert before["y"].shape == (2, 7, 3)
    assert_same(before, evaluate(canonicalize(subject), feeds), TERMS**2)


def test_tables_of_waves_stay_float() -> None:
    for name in ("frames with a window", "half of the waves"):
        subject = canonicalize(imported(CASES[name])[0])
        reasons = [candidate.obstacle for candidate in survey(subject)]
        assert reasons and all(reason is not None and "Fourier" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ('y = GridSample<mode = "bicubic">(x, grid)', "GridSample"),
        ("y = DFT<axis = 1, inverse = 1, onesided = 1>(complex)", "DFT"),
    ],
)
def test_a_form_without_a_body_is_refused_by_name(nodes: str, named: str) -> None:
    subject, _ = imported(nodes)
    canonicalize(subject)
    with pytest.raises(UnsupportedError, match=named):
        refuse_unlowerable(subject)
