from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scaling


def test_noise_ratio_of_a_known_error_over_all_batches() -> None:
    want = [{"y": np.array([3.0, 4.0])}, {"y": np.array([0.0])}]
    got = [{"y": np.array([3.0, 4.0])}, {"y": np.array([0.5])}]
    assert scaling.noise_ratio(want, got) == pytest.approx(20.0, abs=1e-12)
    assert scaling.noise_ratio(want, want) == math.inf


def test_points_come_back_from_their_file_and_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    whole = {"task": "t", "type": "float", "bits": 32, "total_bits": 320, "bits_per_weight": 32}
    part = {"task": "t", "type": "int", "bits": 4, "total_bits": 45, "bits_per_weight": 4.5}
    points = [{**whole, "score": 1.0, "sqnr_db": math.inf}, {**part, "score": 0.5, "sqnr_db": 20.0}]
    scaling.write_csv(points, tmp_path / "x.csv")
    assert scaling.read_csv(tmp_path / "x.csv") == points
    scaling.draw(points, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
