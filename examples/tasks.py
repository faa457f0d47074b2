"""The real models of the examples, each with a test on labelled data that says what its outputs are worth.

A task is made by a function of a module in accuracy/, which is imported when the task is asked for:

cls      PP-OCR angle classifier: share of rendered lines of text whose turn is told right
rec      PP-OCR text recogniser (dynamic width): character error rate on rendered lines
magika   file type from bytes: share of files whose type is that of their extension
digits   MNIST CNN: share of digits told right
speech   silero voice activity: F1 of labelled frames
minilm   sentence encoder: rank correlation of word similarities with people's
tagger   MiniLM trained to tag named entities in tweets: F1 of entities
smollm   SmolLM2-135M: perplexity on the Brown corpus
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).resolve().with_name("accuracy")))

Array = npt.NDArray[np.float64]
Feeds = Mapping[str, npt.NDArray[np.generic]]
Outputs = Iterable[Mapping[str, npt.NDArray[Any]]]  # one mapping a batch

FAST = ("cls", "rec", "magika", "minilm")  # what the benchmarks and the end-to-end tests use


def percent(rows: Array) -> float:
    """Share of rows [n, 1] that are 1, in percent."""
    return 100 * float(rows.mean())


@dataclass(frozen=True)
class Task:
    """A model with its test on labelled data.

    batches: feeds of all samples, in order. timed: feeds of one sample, for timing.
    rows(outputs of all batches) -> f64 [samples, terms]: what each sample (a line, a pair, a sentence) contributes;
    statistic(rows) -> the score, in the unit that `words` names. So a score can be resampled.
    shapes: what is fixed when it is compiled; a letter keeps a dimension free.
    calibration: feeds of other samples, none of which is in `batches`.
    tables: weights of the look-up table and of the output layer, where they are most of a small model.
    better: "higher" or "lower". in_factors: a loss is a factor, not a difference.
    details(rows) -> further numbers or tables, for the record.
    """

    title: str
    model: Path
    batches: Sequence[Feeds]
    timed: Feeds
    rows: Callable[[Outputs], Array]
    statistic: Callable[[Array], float]
    words: str
    shapes: tuple[str, ...] = ()
    calibration: Sequence[Feeds] = ()
    tables: Sequence[str] = ()
    better: str = "higher"
    in_factors: bool = False
    details: Callable[[Array], dict[str, Any]] = lambda _: {}

    def measure(self, outputs: Outputs) -> float:
        """The score of a model by its outputs for `batches`."""
        return self.statistic(self.rows(outputs))

    def describe(self, value: float) -> str:
        """The number with its unit."""
        return self.words.format(value)


def stream_onnx(
    model: Path, batches: Iterable[Feeds], threads: int = 0, *, fused: bool = True
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Outputs of an ONNX file in onnxruntime, batch by batch, with float arithmetic; threads 0: all cores.

    Without `fused` every operator is computed as it stands: the kernel into which onnxruntime 1.31 makes a 2-bit
    DequantizeLinear, MatMul and Add gives other numbers than they (magika with 2-bit weights: 15 dB against -1 dB).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Else it would round the activations of DequantizeLinear + MatMul to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for feeds in batches:
        yield dict(zip(names, session.run(None, dict(feeds)), strict=True))


def run_onnx(model: Path, batches: Iterable[Feeds]) -> list[dict[str, npt.NDArray[Any]]]:
    """Outputs of an ONNX file in onnxruntime for all batches, on all cores."""
    return list(stream_onnx(model, batches))


def joined(outputs: Outputs, name: str | None = None) -> npt.NDArray[np.float32]:
    """One output (the first when no name is given) of all batches along the batch axis."""
    parts = [output[name] if name else next(iter(output.values())) for output in outputs]
    return np.concatenate(parts).astype(np.float32)


def made_by(script: str, model: Path, *arguments: str) -> Path:
    """`model`, written now by a script of the examples when it is not there yet.

    Raises:
        CalledProcessError: the script failed; what it said is on standard error.
    """
    if not model.exists():
        command = [sys.executable, str(Path(__file__).parent / script), "--out", str(model), *arguments]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return model


def _lazily(module: str, function: str) -> Callable[..., Task]:
    def make(*arguments: Any) -> Task:
        task: Task = getattr(importlib.import_module(module), function)(*arguments)
        return task

    return make


TASKS: Mapping[str, Callable[..., Task]] = {
    "cls": _lazily("ocr", "angle_classifier"),
    "rec": _lazily("ocr", "text_recogniser"),
    "magika": _lazily("file_types", "file_type"),
    "digits": _lazily("digits", "digit_classifier"),
    "speech": _lazily("speech", "voice_activity"),
    "minilm": _lazily("similarity", "sentence_encoder"),
    "tagger": _lazily("tweets", "entity_tagger"),
    "smollm": _lazily("brown", "language_model"),
}
