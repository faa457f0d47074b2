"""silero-vad, a network with memory (LSTM) and branches (If), in the four forms in which it is published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kbitc
from kbitc.graph.evaluate import Session
from kbitc.graph.functions import without_rounding
from kbitc.passes.verify.accuracy import LOWERING_CEILING_DB, needed_sqnr_db
from kbitc.quant.metrics import compare
from kbitc.targets.runner.execute import run_bundle

FRAME, STATE, FRAMES = 576, 128, 12  # samples of a frame with its context, numbers remembered, frames of a sound


@dataclass(frozen=True)
class Form:
    """A published form. whole: it takes all frames at once, else one frame and the state of the one before."""

    file: str
    shapes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    whole: bool = False

    def feeds(self) -> list[dict[str, Any]]:
        """A tone that swells and falls, in noise, frame by frame."""
        random, time = np.random.default_rng(0), np.arange(FRAMES * FRAME) / 16000
        sound = (
            np.sin(2 * np.pi * 220 * time) * np.sin(np.pi * time / time[-1]) / 4 + random.normal(size=time.size) / 50
        )
        frames = sound.reshape(FRAMES, FRAME).astype(np.float32)
        if self.whole:
            zero = np.zeros((1, 1, STATE), np.float32)
            return [{"input": frames, "h": zero, "c": zero}]
        states = random.uniform(-1, 1, (FRAMES, 2, 1, STATE)).astype(np.float32)
        return [{"input": frame[None], "state": state} for frame, state in zip(frames, states, strict=True)]


FRAME_SHAPES = (f"input=1x{FRAME}", f"state=2x1x{STATE}")
FORMS = {
    "op15": Form("silero_vad_16k_op15.onnx", FRAME_SHAPES, ("sr=16000",)),
    "ifless": Form("silero_vad_op18_ifless.onnx", FRAME_SHAPES, ("sr=16000",)),
    "openvino": Form("silero_vad_openvino_16k.onnx"),
    "open": Form("silero_vad_16k_sequence.onnx", whole=True),
    "sequence": Form("silero_vad_16k_sequence.onnx", (f"input={FRAMES}x{FRAME}",), whole=True),
}
CASES = [
    pytest.param(name, bits, marks=[] if (name, bits) == ("ifless", 4) else pytest.mark.slow)
    for name in FORMS
    for bits in (8, 4)
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_form_compiles_and_agrees_with_its_quantized_onnx(
    name: str, bits: int, models_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    form = FORMS[name]
    model = models_dir("silero-vad") / form.file
    options: dict[str, Any] = {"bits": bits, "shapes": form.shapes, "constants": form.constants}
    report = kbitc.compile(model, tmp_path / "vad.kbit", **options)
    assert len(report.weights) >= 6 and all(weight.entry.scheme is not None for weight in report.weights)
    kbitc.quantize(model, tmp_path / "vad.onnx", **options)
    onnx.checker.check_model(str(tmp_path / "vad.onnx"), full_check=True)

    module, feeds = kbitc.load(tmp_path / "vad.kbit"), form.feeds()
    quantized = ir.load(tmp_path / "vad.onnx")
    plain = without_rounding(quantized)
    assert plain is not None
    sessions = Session(quantized), Session(plain)
    expected, unrounded = ([session.run(feed) for feed in feeds] for session in sessions)
    rounding, lowering = compare(unrounded, expected), compare(expected, [module(feed) for feed in feeds])
    for output, found in lowering.items():
        assert found.sqnr_db >= needed_sqnr_db(rounding[output].sqnr_db), output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ifless", "open"])
def test_the_module_on_neon_gives_what_x86_gives(name: str, models_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Integers too; those inside a loop cannot be shown."""
    form = FORMS[name]
    bundles = {}
    for target in ("x86", "arm-neon"):
        bundles[target] = tmp_path / f"{target}.kbit"
        kbitc.compile(
            models_dir("silero-vad") / form.file, bundles[target], bits=4, target=target, shapes=form.shapes,
            constants=form.constants, debug_accumulators=True,
        )  # fmt: skip
    feeds = form.feeds()[0]
    here, there = kbitc.load(bundles["x86"])(feeds), run_bundle(bundles["arm-neon"], feeds).outputs
    integers = [name for name in here if name.endswith((".codes", ".accumulators"))]
    assert integers and all(np.array_equal(here[name], there[name]) for name in integers)
    outputs = [name for name in here if name not in integers]
    found = compare([{name: here[name] for name in outputs}], [{name: there[name] for name in outputs}])
    assert all(accuracy.sqnr_db >= LOWERING_CEILING_DB for accuracy in found.values())
