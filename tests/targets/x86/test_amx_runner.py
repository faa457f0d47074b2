"""`kbitc-run` and the variant amx: it refuses what the processor lacks, and computes what Python does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import kbitc
from kbitc.targets import machine
from kbitc.targets.runner.build import runner_folder
from kbitc.targets.target import parse_target
from tests.support import amx, tamper
from tests.support.onnx_text import noise, proto
from tests.support.qemu import need_runner

GRAPH = "g (float[n, 70] x) => (float[n, 40] y) { y = MatMul(x, w) }"
ROWS = 33


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_runner("x86:avx2")
    amx.emulator()
    folder = tmp_path_factory.mktemp("amx")
    for name in ("amx", "avx512vbmi"):
        options = {"target": f"x86:{name}", "scheme": "int4:b32/i4"}
        kbitc.compile(proto(GRAPH, {"w": noise(70, 40)}), folder / f"{name}.kbit", **options)
    np.savez(folder / "x.npz", x=noise(ROWS, 70, seed=3))
    return folder


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    program = runner_folder("x86_64") / "kbitc-run"
    command = [program, folder / "amx.kbit", "--input", folder / "x.npz", "--output", folder / "y.npz", "--json"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_what_the_processor_lacks_is_refused(folder: Path) -> None:
    if set(parse_target(amx.AMX).cpu_features) <= machine.cpu_features():
        pytest.skip("this processor has AMX")
    done = run(folder)
    assert done.returncode == 8 and "x86:amx needs the processor feature amx_" in done.stderr


def test_it_computes_what_python_does(folder: Path) -> None:
    if amx.emulator() is not None:
        tamper.variant(cpu_features=list(parse_target("x86:avx512vbmi").cpu_features))(folder / "amx.kbit")
    done = run(folder, LD_PRELOAD=str(amx.library()), AMX_EMULATOR="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == amx.AMX
    with np.load(folder / "x.npz") as given, np.load(folder / "y.npz") as found:
        wanted = kbitc.load(folder / "avx512vbmi.kbit")(dict(given))
        np.testing.assert_array_equal(found["y"], wanted["y"])
