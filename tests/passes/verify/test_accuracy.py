"""The two gates of verification: lowering must not add to the error, and --min-sqnr must hold."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import AccuracyError, InternalError
from kbitc.passes.verify.accuracy import Accuracy, References, check_floor, check_lowering, measure, reference_runs
from tests.support.onnx_text import model

RANDOM = np.random.default_rng(5)
ORIGINAL = RANDOM.normal(size=(4, 100)).astype(np.float32)
NOISE = RANDOM.normal(size=ORIGINAL.shape).astype(np.float32)
WEIGHTS_ONLY = (ORIGINAL + RANDOM.normal(size=ORIGINAL.shape)).astype(np.float32)  # an error as at 2 bits: 0 dB
QUANTIZED = (WEIGHTS_ONLY + RANDOM.normal(size=ORIGINAL.shape) * 0.01).astype(np.float32)


def _references(unrounded: np.ndarray) -> References:
    return References([{}], [{"y": ORIGINAL}], [{"y": QUANTIZED}], [{"y": unrounded}], "test")


def _measure(module: np.ndarray, unrounded: np.ndarray = WEIGHTS_ONLY) -> Accuracy:
    return measure(_references(unrounded), lambda feeds: {"y": module})


def test_a_module_may_hold_another_draw_of_the_rounding_noise() -> None:
    independent, opposite = 0.01 * NOISE, 0.99 * (WEIGHTS_ONLY - QUANTIZED)
    for noise in (independent, opposite):
        check_lowering(_measure((WEIGHTS_ONLY + noise).astype(np.float32)))


def test_more_than_two_draws_of_the_rounding_noise_are_refused_however_few_bits_the_weights_have() -> None:
    accuracy = _measure(QUANTIZED + NOISE * np.float32(0.025))
    assert accuracy.quantized["y"].sqnr_db < 1 and accuracy.rounding["y"].sqnr_db > 40
    with pytest.raises(InternalError, match="departs from its quantized ONNX.*output 'y'.*needs 36.9"):
        check_lowering(accuracy)


def test_without_rounded_activations_only_float32_sums_may_differ() -> None:
    check_lowering(_measure(QUANTIZED + NOISE * np.float32(1e-4), unrounded=QUANTIZED))
    with pytest.raises(InternalError, match="needs 60"):
        check_lowering(_measure(QUANTIZED + NOISE * np.float32(1e-2), unrounded=QUANTIZED))


def test_integers_must_be_equal() -> None:
    references = References([{}], [{"y": ORIGINAL}], [{"y": QUANTIZED}], [{"y": QUANTIZED}], "test", exact=True)
    check_lowering(measure(references, lambda feeds: {"y": QUANTIZED}))
    other = np.nextafter(QUANTIZED, np.float32(9))
    with pytest.raises(InternalError, match="differs from its integer ONNX"):
        check_lowering(measure(references, lambda feeds: {"y": other}))


def test_a_module_that_is_closer_to_the_original_but_not_to_its_onnx_is_refused() -> None:
    with pytest.raises(InternalError):
        check_lowering(_measure(ORIGINAL))


def test_min_sqnr_is_held() -> None:
    accuracy = _measure(QUANTIZED)
    check_floor(accuracy, None)
    check_floor(accuracy, accuracy.worst_sqnr_db)
    with pytest.raises(AccuracyError, match="asked for 30 dB"):
        check_floor(accuracy, 30.0)


def test_without_a_module_the_quantized_onnx_is_judged() -> None:
    accuracy = measure(_references(WEIGHTS_ONLY), None)
    check_lowering(accuracy)
    with pytest.raises(AccuracyError):
        check_floor(accuracy, 30.0)


def test_outputs_are_held_up_to_a_limit() -> None:
    subject = model("g (float[N, 8] x) => (float[] y) { y = Relu(x) }")
    feeds = [{"x": np.full((1, 8), number, np.float32)} for number in range(9)]
    found = reference_runs(subject, subject, feeds, "9 batches", held=3 * 32)
    assert len(found.feeds) == len(found.original) == len(found.quantized) == 3
    assert found.data == "9 batches, compared on the first 3"
    assert reference_runs(subject, subject, feeds, "9 batches").data == "9 batches"
