"""kbitc-run under the address and undefined-behaviour sanitizers, on damaged bundles and damaged array files."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kbitc.targets import machine
from kbitc.targets.link import find_compiler
from kbitc.targets.runner import build, libraries
from tests.support import tamper, tiny
from tests.support.qemu import need_runner

pytestmark = pytest.mark.slow
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c++17")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_runner("reference")
    here = machine.architecture()
    folder = tmp_path_factory.mktemp("sanitized")
    places = {path.parent for path in libraries.find_libraries(here).values()}
    find_compiler(here, prefer_zig=False).run(
        [
            *SANITIZERS,
            '-DKBITC_TVM_VERSION="' + libraries.installed_version("apache-tvm") + '"',
            *("-isystem", libraries.include_folder(), build.SOURCES / "main.cc", "-o", folder / "kbitc-run"),
            *(f"-L{place}" for place in places),
            *build.LIBRARIES,
            *(f"-Wl,-rpath,{place}" for place in places),
        ],
        "kbitc-run with sanitizers",
    )
    return folder / "kbitc-run"


def run(program: Path, bundle: Path, feeds: Path, *options: str) -> int:
    # TVM's own library keeps its registries for ever, which the leak check would report.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, bundle, "--input", feeds, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    return done.returncode


def test_a_good_run_is_clean(sanitized: Path, tmp_path: Path) -> None:
    bundle = tiny.compile_tiny("reference").write(tmp_path / "a.kbit")
    np.savez_compressed(tmp_path / "x.npz", **tiny.feeds())
    assert run(sanitized, bundle, tmp_path / "x.npz", "--output", str(tmp_path / "y.npz"), "--json") == 0


def test_damaged_bundles_are_clean(sanitized: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **tiny.feeds())
    for name, damage in tamper.WAYS.items():
        folder = tmp_path / "case"
        folder.mkdir()
        extra = {"lib/extra.so": b"not a library"}
        bundle = tiny.compile_tiny("reference").write(folder / "a.kbit", runtime_files=extra)
        damage(bundle)
        assert run(sanitized, bundle, tmp_path / "x.npz") == 8, name
        shutil.rmtree(folder)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_array_files_are_clean(sanitized: Path, tmp_path: Path, compressed: bool) -> None:
    bundle = tiny.compile_tiny("reference").write(tmp_path / "a.kbit")
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **tiny.feeds())
    data = buffer.getvalue()
    rng = np.random.default_rng(1)
    for trial in range(300):
        broken = bytearray(data)
        if trial % 4 == 0:
            broken = broken[: rng.integers(0, len(data))]
        for _ in range(trial % 4):
            broken[rng.integers(0, len(data))] = rng.integers(0, 256)
        (tmp_path / "x.npz").write_bytes(broken)
        assert run(sanitized, bundle, tmp_path / "x.npz") in (0, 5), trial
