from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import file_types
import numpy as np
import tasks


def test_file_features_are_both_ends_without_outer_space_padded() -> None:
    short = file_types.file_bytes(b"  ab \n")
    assert short[:3].tolist() == [ord("a"), ord("b"), ord(" ")], "only the outer end is stripped"
    assert short[-3:].tolist() == [ord(" "), ord("a"), ord("b")]
    assert (short == file_types.PADDING).sum() == 2048 - 4 - 4
    long = file_types.file_bytes(bytes(range(256)) * 64)
    assert long.shape == (2048,) and long.dtype == np.int32
    assert long[:256].tolist() == list(range(256)) == long[-256:].tolist()
    assert (file_types.file_bytes(b"") == file_types.PADDING).all()


def test_reading_the_ends_gives_the_features_of_the_whole_file(tmp_path: Path) -> None:
    for size in (0, 5, 4096, 8192, 8193, 50000):
        content = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(content)
        ends = file_types.read_ends(tmp_path / "file")
        assert len(ends) <= 8192 and (file_types.file_bytes(ends) == file_types.file_bytes(content)).all()


def test_every_type_that_is_called_right_is_one_the_model_knows(models_dir: Callable[[str], Path]) -> None:
    labels = json.loads((models_dir("magika") / "config.min.json").read_text())["target_labels_space"]
    assert {kind for kinds in file_types.TYPES.values() for kind in kinds} <= set(labels)


def test_the_float_model_tells_python_files(models_dir: Callable[[str], Path]) -> None:
    """Files of the standard library: a feature extraction that is wrong would not find them to be Python."""
    folder = models_dir("magika")
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::20]
    features = np.stack([file_types.file_bytes(file.read_bytes()) for file in files])
    outputs = tasks.run_onnx(folder / "model.onnx", [{"bytes": features}])
    found = [labels[index] for index in next(iter(outputs[0].values())).argmax(axis=1)]
    assert found.count("python") >= 0.9 * len(files) >= 5
