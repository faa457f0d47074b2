from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import similarity
import speech
import tasks


def test_frames_overlap_by_their_context_and_labels_follow_the_middles(tmp_path: Path) -> None:
    samples = np.arange(3 * speech.FRAME + 100, dtype="<i2")
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((1, 2, speech.RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    frames = speech.framed(speech.read_samples(tmp_path / "x.wav"))
    assert frames.shape == (3, 576) and (frames[0, :64] == 0).all()
    assert (frames[1] * 2**15 == samples[512 - 64 : 1024]).all()
    (tmp_path / "x.rttm").write_text("SPEAKER x 1 0.040 0.030 <NA> <NA> a <NA> <NA>\n")
    assert speech.read_labels(tmp_path / "x.rttm", 4).tolist() == [False, True, False, False]


def test_variants_are_as_long_and_the_first_is_the_recording() -> None:
    samples = np.sin(np.arange(2000, dtype=np.float32))
    made = speech.variants(samples)
    assert len(made) == len(speech.SPEEDS) * len(speech.GAINS) * len(speech.NOISES)
    assert all(each.shape == samples.shape and each.dtype == np.float32 for each in made)
    np.testing.assert_array_equal(made[0][:-1], samples[:-1])


def test_another_recording_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
    with pytest.raises(ValueError, match="one channel of 16 bits at 16000 Hz"):
        speech.read_samples(tmp_path / "x.wav")


def test_f1_and_area_of_known_rows() -> None:
    rows = np.array([[0.9, 1], [0.6, 0], [0.4, 1], [0.1, 0]])
    assert speech.f1(rows) == 50.0
    assert speech.area_under_curve(rows) == 75.0
    assert speech.area_under_curve(np.array([[0.5, 1], [0.5, 0]])) == 50.0


def test_the_float_model_hears_speech(models_dir: Callable[[str], Path]) -> None:
    models_dir("silero-vad"), models_dir("data-speech30s")
    task = tasks.TASKS["speech"]()
    assert task.measure(tasks.run_onnx(task.model, task.batches)) > 98


def test_ranks_share_the_mean_where_values_are_equal() -> None:
    assert similarity.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_rank_correlation_ignores_the_other_set_and_the_scale() -> None:
    rows = np.array([[0, 0.1, 1.0], [0, 0.2, 5.0], [0, 0.9, 9.0], [1, 0.1, 9.0], [1, 0.2, 1.0]])
    assert similarity.spearman(rows) == pytest.approx(100, abs=1e-12)
    rows[:, 1] = np.exp(rows[:, 1])
    assert similarity.spearman(rows) == pytest.approx(100, abs=1e-12)
