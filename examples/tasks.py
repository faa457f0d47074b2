"""The real models of the examples, each with a test of what its outputs are worth.

cls     PP-OCR angle classifier: accuracy on rendered lines of text, half of them turned by 180 degrees
rec     PP-OCR text recogniser (dynamic width): character error rate on rendered lines
magika  file type from bytes: share of files for which the most likely type is the float model's
minilm  sentence encoder: cosine of its sentence vectors with the float model's
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fetch
import lines
import numpy as np
import numpy.typing as npt
from wordpiece import WordPiece

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]
Outputs = Sequence[Mapping[str, Array]]  # one mapping a batch

MAGIKA_BLOCK, MAGIKA_PART, MAGIKA_PADDING = 4096, 1024, 256  # bytes read at each end, bytes kept, padding token


@dataclass(frozen=True)
class Task:
    """A model with its test.

    batches: feeds of all samples. timed: feeds of one sample, for timing.
    measure(outputs of the float model, outputs of the model to judge) -> the number, in the unit that `words` names.
    shapes: what is fixed when it is compiled; a letter keeps a dimension free.
    """

    title: str
    model: Path
    batches: Sequence[Feeds]
    timed: Feeds
    measure: Callable[[Outputs, Outputs], float]
    words: str
    shapes: tuple[str, ...] = ()

    def describe(self, value: float) -> str:
        """The number with its unit."""
        return self.words.format(value)


def run_onnx(model: Path, batches: Sequence[Feeds]) -> Outputs:
    """Outputs of an ONNX file in onnxruntime, for every batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(None, dict(feeds)), strict=True)) for feeds in batches]


def _joined(outputs: Outputs, name: str | None = None) -> npt.NDArray[np.float32]:
    """One output (the first when no name is given) of all batches along the batch axis."""
    parts = [output[name] if name else next(iter(output.values())) for output in outputs]
    return np.concatenate(parts).astype(np.float32)


def angle_classifier(count: int = 300) -> Task:
    """Share of `count` rendered lines, half of them turned, that are told right, in percent."""
    model = fetch.fetch("ocr") / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    made = lines.make_lines(count)
    batches = [{"x": lines.classifier_batch(part)} for part in lines.batches(made)]

    def measure(_: Outputs, outputs: Outputs) -> float:
        return 100 * lines.classifier_accuracy(_joined(outputs), made)

    return Task(
        "OCR line angle", model, batches, {"x": batches[0]["x"][:1]}, measure, "{:.1f} % right", ("x=Nx3x48x192",)
    )


def text_recogniser(count: int = 100) -> Task:
    """Characters read wrong over the characters of `count` upright rendered lines, in percent."""
    model = fetch.fetch("ocr") / "ch_PP-OCRv4_rec_infer.onnx"
    alphabet = lines.read_alphabet(model)
    made = sorted(lines.make_lines(count, turn_half=False), key=lambda line: lines.scaled_width(line.pixels))
    batches = [{"x": lines.recogniser_batch(part)} for part in lines.batches(made, 5)]

    def measure(_: Outputs, outputs: Outputs) -> float:
        read = [text for output in outputs for text in lines.decode(next(iter(output.values())), alphabet)]
        return 100 * lines.character_error_rate(read, made)

    timed = {"x": lines.recogniser_batch(made[len(made) // 2 : len(made) // 2 + 1])}
    return Task("OCR text", model, batches, timed, measure, "{:.2f} % wrong", ("x=Nx3x48xW",))


def file_bytes(content: bytes) -> npt.NDArray[np.int32]:
    """Magika's features, i32 [2048]: the first and the last 1024 bytes without outer white space, padded with 256."""
    features = np.full(2 * MAGIKA_PART, MAGIKA_PADDING, np.int32)
    begin = np.frombuffer(content[:MAGIKA_BLOCK].lstrip()[:MAGIKA_PART], np.uint8)
    end = np.frombuffer(content[-MAGIKA_BLOCK:].rstrip()[-MAGIKA_PART:], np.uint8)
    features[: len(begin)] = begin
    features[len(features) - len(end) :] = end
    return features


def file_type(count: int = 200) -> Task:
    """Share of `count` files of the Python installation that get the type the float model gives them, in percent."""
    model = fetch.fetch("magika") / "model.onnx"
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "__pycache__"}  # what these hold differs between machines and from run to run
    found = sorted(path for path in library.rglob("*.*") if path.is_file() and not skipped & set(path.parts))
    files = found[:: max(1, len(found) // count)][:count]
    features = np.stack([file_bytes(path.read_bytes()) for path in files])
    batches = [{"bytes": features[start : start + 20]} for start in range(0, len(features), 20)]

    def measure(reference: Outputs, outputs: Outputs) -> float:
        return 100 * float((_joined(reference).argmax(1) == _joined(outputs).argmax(1)).mean())

    return Task("file type", model, batches, {"bytes": features[:1]}, measure, "{:.1f} % the same")


def sentence_encoder(count: int = 60) -> Task:
    """Mean cosine between the model's and the float model's vectors of `count` sentences."""
    folder = fetch.fetch("minilm")
    model = folder / "minilm.onnx"
    if not model.exists():
        export = Path(__file__).with_name("export_minilm.py")
        subprocess.run([sys.executable, str(export), "--models", str(folder)], check=True, stdout=sys.stderr)
    tokenizer = WordPiece(folder / "vocab.txt")
    texts = [line.text for line in lines.make_lines(count, seed=1, turn_half=False)]
    batches = [tokenizer.batch(texts[start : start + 10]) for start in range(0, len(texts), 10)]

    def measure(reference: Outputs, outputs: Outputs) -> float:
        a, b = (_joined(each, "sentence_embedding") for each in (reference, outputs))
        return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())

    timed = tokenizer.batch([" ".join(texts)], max_length=128)
    return Task("MiniLM sentences", model, batches, timed, measure, "cosine {:.4f}")


TASKS: Mapping[str, Callable[..., Task]] = {
    "cls": angle_classifier,
    "rec": text_recogniser,
    "magika": file_type,
    "minilm": sentence_encoder,
}
