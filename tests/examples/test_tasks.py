from __future__ import annotations

from pathlib import Path

import file_types
import numpy as np
import pytest
import speech
import tasks


def test_measures_know_the_best_and_a_worse_answer() -> None:
    task = tasks.TASKS["cls"](40)
    right = np.array([[1.0, 0.0], [0.0, 1.0]] * 10, np.float32)
    assert task.measure([{"y": right}, {"y": right}]) == 100.0
    assert task.measure(iter([{"y": right}, {"y": right[::-1]}])) == 50.0
    assert task.describe(93.25) == "93.2 % right"


@pytest.mark.parametrize("name", ["cls", "rec", "magika", "speech", "minilm"])
def test_what_calibrates_is_not_measured(name: str, real_models: dict[str, Path]) -> None:
    """No sample of the calibration is among the measured ones (speech: among the frames whose labels count)."""
    task = tasks.TASKS[name]()

    def samples(batches: object) -> set[bytes]:
        first = [np.asarray(next(iter(feeds.values()))) for feeds in batches]  # type: ignore[attr-defined]
        return {np.trim_zeros(row.reshape(-1)).tobytes() for array in first for row in array}

    measured, calibrating = samples(task.batches), samples(task.calibration)
    assert measured and calibrating
    if name == "speech":
        measured = samples([{"input": feeds["input"][speech.BEFORE :]} for feeds in task.batches])
    assert not measured & calibrating


def test_files_that_a_model_sees_alike_are_one_sample(tmp_path: Path) -> None:
    seen, other = b"x" * 4096, b"y" * 4096
    contents = [seen + middle * 4096 + seen for middle in (b"1", b"2")] + [seen + other, b"  " + seen + other]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    features, kept = file_types.distinct(paths)
    assert kept == [paths[1], paths[3]]
    assert np.array_equal(features, [file_types.file_bytes(file_types.read_ends(path)) for path in kept])


def test_a_script_that_fails_is_not_taken_for_done(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(tasks.subprocess.CalledProcessError):
        tasks.made_by(str(script), tmp_path / "model.onnx")


def test_a_script_is_run_once(tmp_path: Path) -> None:
    script, model = tmp_path / "writes.py", tmp_path / "model.onnx"
    script.write_text("import sys; open(sys.argv[2], 'a').write('x')")
    for _ in range(2):
        assert tasks.made_by(str(script), model) == model
    assert model.read_text() == "x"
