"""The PP-OCR models on rendered lines of text: is a line upside down, and what does it say."""

from __future__ import annotations

from collections.abc import Sequence

import fetch
import lines
import numpy as np
from tasks import Array, Outputs, Task, joined, percent

CALIBRATION_SEED = 1000  # of lines that no measurement uses
# The classifier pools a whole line before its last layers: they see one row a line, the recogniser's one a column.
CLASSIFIER_CALIBRATION, RECOGNISER_CALIBRATION = 256, 64  # lines


def angle_classifier(count: int = 300) -> Task:
    """Share of `count` rendered lines, half of them turned, that are told right, in percent."""
    model = fetch.fetch("ocr") / "ch_ppocr_mobile_v2.0_cls_infer.onnx"

    def feeds(made: Sequence[lines.Line]) -> list[dict[str, np.ndarray]]:
        return [{"x": lines.classifier_batch(part)} for part in lines.batches(made)]

    made = lines.make_lines(count)
    turned = np.array([line.turned for line in made])
    batches = feeds(made)

    def rows(outputs: Outputs) -> Array:
        return (joined(outputs).argmax(axis=1) == turned)[:, None].astype(np.float64)

    calibration = feeds(lines.make_lines(CLASSIFIER_CALIBRATION, CALIBRATION_SEED))
    return Task(
        "OCR line angle", model, batches, {"x": batches[0]["x"][:1]}, rows, percent, "{:.1f} % right",
        ("x=Nx3x48x192",), calibration,
    )  # fmt: skip


def error_rate(rows: Array) -> float:
    """Edits over characters, in percent. rows: f64 [lines, 2] of edits and characters."""
    return 100 * float(rows[:, 0].sum() / rows[:, 1].sum())


def text_recogniser(count: int = 100) -> Task:
    """Characters read wrong over the characters of `count` upright rendered lines, in percent."""
    model = fetch.fetch("ocr") / "ch_PP-OCRv4_rec_infer.onnx"
    alphabet = lines.read_alphabet(model)

    def by_width(count: int, seed: int) -> list[lines.Line]:
        return sorted(lines.make_lines(count, seed, turn_half=False), key=lambda line: lines.scaled_width(line.pixels))

    def feeds(made: Sequence[lines.Line]) -> list[dict[str, np.ndarray]]:
        return [{"x": lines.recogniser_batch(part)} for part in lines.batches(made, 5)]

    made = by_width(count, 0)

    def rows(outputs: Outputs) -> Array:
        read = [text for output in outputs for text in lines.decode(next(iter(output.values())), alphabet)]
        return np.array([lines.errors(text, line) for text, line in zip(read, made, strict=True)], np.float64)

    timed = {"x": lines.recogniser_batch(made[len(made) // 2 : len(made) // 2 + 1])}
    return Task(
        "OCR text", model, feeds(made), timed, rows, error_rate, "{:.2f} % wrong", ("x=Nx3x48xW",),
        feeds(by_width(RECOGNISER_CALIBRATION, CALIBRATION_SEED)), better="lower",
    )  # fmt: skip
