from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tasks


def test_file_features_are_both_ends_without_outer_space_padded() -> None:
    short = tasks.file_bytes(b"  ab \n")
    assert short[:3].tolist() == [ord("a"), ord("b"), ord(" ")], "only the outer end is stripped"
    assert short[-3:].tolist() == [ord(" "), ord("a"), ord("b")]
    assert (short == tasks.MAGIKA_PADDING).sum() == 2048 - 4 - 4
    long = tasks.file_bytes(bytes(range(256)) * 64)
    assert long.shape == (2048,) and long.dtype == np.int32
    assert long[:256].tolist() == list(range(256)) == long[-256:].tolist()
    assert (tasks.file_bytes(b"") == tasks.MAGIKA_PADDING).all()


def test_the_float_model_tells_python_files(models_dir: Callable[[str], Path]) -> None:
    """Files of the standard library: a feature extraction that is wrong would not find them to be Python."""
    import json

    folder = models_dir("magika")
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    files = sorted(Path(tasks.sysconfig.get_path("stdlib")).glob("*.py"))[::20]
    outputs = tasks.run_onnx(
        folder / "model.onnx", [{"bytes": np.stack([tasks.file_bytes(f.read_bytes()) for f in files])}]
    )
    found = [labels[index] for index in next(iter(outputs[0].values())).argmax(axis=1)]
    assert found.count("python") >= 0.9 * len(files) >= 5


def test_measures_know_the_best_and_a_worse_answer() -> None:
    task = tasks.angle_classifier(40)
    right = np.array([[1.0, 0.0], [0.0, 1.0]] * 10, np.float32)
    assert task.measure([], [{"y": right}, {"y": right}]) == 100.0
    assert task.measure([], [{"y": right}, {"y": right[::-1]}]) == 50.0
    assert task.describe(93.25) == "93.2 % right"
