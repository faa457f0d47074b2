"""`--keep-onnx`: a bundle that can be compared with what it was compiled from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import kbitc
from kbitc.bundle.manifest import QUANTIZED
from kbitc.bundle.runtime import Model
from kbitc.cli import _guarded
from kbitc.errors import InternalError
from tests.support.onnx_text import noise, proto

GRAPH = "g (int64[n, 3] ids) => (float[n, 3, 7] y) { e = Gather(table, ids) r = Relu(e) y = MatMul(r, b) }"
CONV = "g (float[2, 3, 12, 10] x) => (float[2, 40, 12, 10] y) { c = Conv<pads = [1, 1, 1, 1]>(x, a) y = Relu(c) }"


@pytest.fixture(scope="module", params=["int3", "static"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    if request.param == "static":
        feeds = [{"x": noise(2, 3, 12, 10, seed=seed)} for seed in range(2)]
        model = proto(CONV, {"a": noise(40, 3, 3, 3)})
        options = {"bits": 8, "activations": "static", "calibration": feeds}
    else:
        model = proto(GRAPH, {"table": noise(20, 40), "b": noise(40, 7)})
        options = {"scheme": "int3:b16"}
    onnx.save(model, folder / "model.onnx")
    report = kbitc.compile(folder / "model.onnx", folder / "m.kbit", keep_onnx=True, **options)
    assert report.bytes[QUANTIZED] == (folder / "m.kbit" / QUANTIZED).stat().st_size
    return folder / "m.kbit"


@pytest.mark.parametrize("with_model", [False, True])
def test_verify_compares_the_module_with_its_onnx(
    bundle: Path, capsys: pytest.CaptureFixture[str], with_model: bool
) -> None:
    given = ["--model", str(bundle.with_name("model.onnx"))] if with_model else []
    assert _guarded(["verify", str(bundle), *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lowering"]["y"]["sqnr_db"] > 60
    assert ("outputs" in found) == with_model
    assert _guarded(["verify", str(bundle), *given]) == 0
    assert "from the quantized ONNX" in capsys.readouterr().out


def test_a_module_that_departs_is_found(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Model.__call__

    def wrong(self: Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: 1.5 * array for name, array in call(self, feeds).items()}

    monkeypatch.setattr(Model, "__call__", wrong)
    assert _guarded(["verify", str(bundle), "--model", str(bundle.with_name("model.onnx"))]) == InternalError.exit_code
    assert "from its" in capsys.readouterr().err


def test_a_bundle_without_it_is_checked_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = proto(GRAPH, {"table": noise(20, 40), "b": noise(40, 7)})
    kbitc.compile(model, tmp_path / "m.kbit", target="reference")
    assert not (tmp_path / "m.kbit" / QUANTIZED).exists()
    assert _guarded(["verify", str(tmp_path / "m.kbit"), "--json"]) == 0
    assert "lowering" not in json.loads(capsys.readouterr().out)
