"""Pictures of benchmark results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="plots are an extra")

import plots

LIMITS = {"read_gb_per_s": {"L3": 50.0, "memory": 20.0}, "integer_gop_per_s": 400.0}
BASE = "onnxruntime fp32"


def _row(case: str, **facts: Any) -> dict[str, Any]:
    times = {BASE: 4.0, **{f"kbitc int{k}:b32": 0.1 * k for k in range(1, 9)}, "kbitc nf4:b32": 0.4}
    return {
        "case": case,
        **facts,
        "against": BASE,
        "milliseconds": times,
        "speed": {n: 4 / t for n, t in times.items()},
    }


def test_a_picture_for_each_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    contents = {
        "gemv": [_row("1 x 4096x4096, 1 layer(s)", layers=1), _row("1 x 4096x4096, 8 layer(s)", layers=8)],
        "gemm": [_row("8 x 4096x4096", rows=8), _row("32 x 4096x4096", rows=32)],
    }
    for name, rows in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"limits": LIMITS, "rows": rows}), encoding="utf-8")
    first = [path.read_text(encoding="utf-8") for path in plots.draw()]
    assert len(first) == 2
    assert [path.name for path in sorted(tmp_path.glob("*.svg"))] == ["gemm.svg", "gemv.svg"]
    assert [path.read_text(encoding="utf-8") for path in plots.draw()] == first


def test_other_engines_are_drawn_at_the_bits_of_their_weights_by_their_fastest() -> None:
    times = {
        "onnxruntime fp32": 9.0,
        "onnxruntime MatMulNBits 4 bits": 3.0,
        "onnxruntime MatMulNBits 4 bits, block 128": 2.0,
        "onnxruntime MatMulNBits 2 bits, block 128": 1.0,
        "OpenVINO fp32, hint f32": 8.0,
        "OpenVINO int8, default": 4.0,
        "ggml q4_0": 2.5,
        "ggml q4_0 CPU_REPACK": 1.5,
        "kbitc int4:b32": 0.5,
    }
    wanted = {"onnxruntime": {4: 2.0, 2: 1.0}, "OpenVINO": {8: 4.0}, "ggml": {4: 1.5}}
    assert plots._peers(times) == wanted
