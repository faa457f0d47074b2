from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lines
import numpy as np
import onnxruntime
import pytest


def test_one_seed_gives_one_picture_and_another_seed_another() -> None:
    first, again, other = (lines.make_lines(6, seed) for seed in (1, 1, 2))
    assert [a.text for a in first] == [a.text for a in again]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert [a.text for a in first] != [a.text for a in other]


def test_every_second_line_is_turned_and_turning_it_back_gives_the_upright_one() -> None:
    mixed, upright = lines.make_lines(6, 3), lines.make_lines(6, 3, turn_half=False)
    assert [line.turned for line in mixed] == [False, True] * 3
    for a, b in zip(mixed, upright, strict=True):
        assert np.array_equal(np.rot90(a.pixels, 2) if a.turned else a.pixels, b.pixels)


def test_preprocessing_scales_to_minus_one_to_one_and_pads_with_zeros() -> None:
    white, black = np.full((24, 50), 255, np.uint8), np.zeros((24, 50), np.uint8)
    values = lines.to_input(white, 192)
    assert values.shape == (3, 48, 192) and values.dtype == np.float32
    assert (values[:, :, :100] == 1.0).all() and (values[:, :, 100:] == 0.0).all()
    assert (lines.to_input(black, 100) == -1.0).all()
    assert lines.to_input(np.zeros((10, 900), np.uint8), 192).shape == (3, 48, 192), "a long line is squeezed"


def test_the_recogniser_batch_fits_the_widest_line_in_steps_of_eight() -> None:
    made = lines.make_lines(4, 5)
    width = lines.recogniser_batch(made).shape[3]
    widest = max(lines.scaled_width(line.pixels) for line in made)
    assert width % 8 == 0 and 0 <= width - widest < 8


def test_ctc_decoding_merges_repeats_and_drops_blanks() -> None:
    alphabet = ["", "a", "b", " "]
    path = np.array([[0, 1, 1, 0, 1, 2, 2, 3, 0, 2]])
    assert lines.decode(np.eye(4, dtype=np.float32)[path], alphabet) == ["aab b"]


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert lines.edit_distance(a, b) == lines.edit_distance(b, a) == edits


def test_error_rate_counts_characters_without_spaces() -> None:
    line = lines.Line("ab cd", np.zeros((1, 1), np.uint8), False)
    assert lines.character_error_rate(["abcd"], [line]) == 0.0
    assert lines.character_error_rate(["abXd"], [line]) == 0.25


def test_the_float_models_read_these_lines(models_dir: Callable[[str], Path]) -> None:
    """Published for these models: 93.3 % of 300 lines, character error rate 0.13 %. Three standard deviations of a
    share of 0.933 over 100 lines are 7.5 points; of 2,500 characters 0.2 points."""
    folder = models_dir("ocr")
    made = lines.make_lines(100, 7)
    session = onnxruntime.InferenceSession(str(folder / "ch_ppocr_mobile_v2.0_cls_infer.onnx"))
    scores = session.run(None, {session.get_inputs()[0].name: lines.classifier_batch(made)})[0]
    assert lines.classifier_accuracy(scores, made) > 0.933 - 0.075

    model = folder / "ch_PP-OCRv4_rec_infer.onnx"
    upright = lines.make_lines(100, 7, turn_half=False)[:30]
    session = onnxruntime.InferenceSession(str(model))
    scores = session.run(None, {session.get_inputs()[0].name: lines.recogniser_batch(upright)})[0]
    read = lines.decode(scores, lines.read_alphabet(model))
    assert lines.character_error_rate(read, upright) < 0.0013 + 0.002


def test_a_model_without_its_alphabet_is_refused(models_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="no metadata entry 'character'"):
        lines.read_alphabet(models_dir("ocr") / "ch_ppocr_mobile_v2.0_cls_infer.onnx")
