"""The two gates of verification: lowering must not add to the error, and --min-sqnr must hold."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import AccuracyError, InternalError
from kbitc.passes.verify.accuracy import Accuracy, References, check_floor, check_lowering, measure

RANDOM = np.random.default_rng(5)
ORIGINAL = RANDOM.normal(size=(4, 100)).astype(np.float32)
NOISE = RANDOM.normal(size=ORIGINAL.shape).astype(np.float32)
QUANTIZED = (ORIGINAL + RANDOM.normal(size=ORIGINAL.shape) * 0.1).astype(np.float32)


def _measure(module: np.ndarray) -> Accuracy:
    references = References([{}], [{"y": ORIGINAL}], [{"y": QUANTIZED}], "test")
    return measure(references, lambda feeds: {"y": module})


def test_a_module_close_to_its_onnx_passes() -> None:
    accuracy = _measure(QUANTIZED + np.float32(1e-3))
    check_lowering(accuracy, rounded_activations=False)
    assert accuracy.quantized["y"].sqnr_db == pytest.approx(20, abs=1)
    assert accuracy.lowering is not None and accuracy.lowering["y"].sqnr_db > 50


def test_a_module_that_departs_from_its_onnx_is_refused() -> None:
    with pytest.raises(InternalError, match="departs from its quantized ONNX.*output 'y'"):
        check_lowering(_measure(QUANTIZED + NOISE * np.float32(0.05)), rounded_activations=False)


def test_a_module_that_is_closer_to_the_original_but_not_to_its_onnx_is_refused() -> None:
    with pytest.raises(InternalError):
        check_lowering(_measure(ORIGINAL), rounded_activations=False)


def test_rounded_activations_may_be_another_draw_of_the_same_noise_but_no_more() -> None:
    check_lowering(_measure(QUANTIZED + NOISE * np.float32(0.1)), rounded_activations=True)
    with pytest.raises(InternalError, match="needs 17"):
        check_lowering(_measure(QUANTIZED + NOISE * np.float32(0.2)), rounded_activations=True)


def test_min_sqnr_is_held() -> None:
    accuracy = _measure(QUANTIZED)
    check_floor(accuracy, None)
    check_floor(accuracy, accuracy.worst_sqnr_db)
    with pytest.raises(AccuracyError, match="asked for 30 dB"):
        check_floor(accuracy, 30.0)


def test_without_a_module_the_quantized_onnx_is_judged() -> None:
    references = References([{}], [{"y": ORIGINAL}], [{"y": QUANTIZED}], "test")
    accuracy = measure(references, None)
    check_lowering(accuracy, rounded_activations=False)
    with pytest.raises(AccuracyError):
        check_floor(accuracy, 30.0)
