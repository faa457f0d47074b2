"""The device path of the runtime: a bundle for cuda, run through TVM's CUDA runtime on the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kbitc.bundle.runtime import load
from kbitc.errors import BundleError
from kbitc.targets import machine
from kbitc.targets.runner.execute import run_bundle
from tests.support import tamper, tiny
from tests.support.qemu import need_runner
from tests.targets.cuda.emulator.emulator import Emulator, lacks


def run_tiny(folder: str, rows: int) -> dict[str, npt.NDArray[Any]]:
    """In the emulator's process: compile the tiny model for cuda, stage a bundle, run it twice from there."""
    from kbitc.bundle.runtime import load_parts
    from kbitc.bundle.writer import Compiled, stage
    from kbitc.targets.build import compile_module
    from kbitc.targets.rules.base import schedule
    from kbitc.targets.target import parse_target

    target = parse_target("cuda:sm_90")
    module, _ = schedule(tiny.module(), target, target.schedule_rules())
    library = compile_module(module, target)
    with stage(Path(folder) / "a.kbit") as staging:
        staging.write_variants([Compiled(target, library, tiny.weights())])
        model = load_parts(
            staging.folder / "module.so", staging.weights, staging.parameters, tiny.INPUTS, tiny.OUTPUTS, device="cuda"
        )
        model(tiny.feeds(rows + 1))
        outputs = model(tiny.feeds(rows))
        staging.commit(tiny.INPUTS, tiny.OUTPUTS, kbitc_version="0")
    return outputs


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    need_runner("reference")
    if (reason := lacks()) is not None:
        pytest.skip(reason)
    made = Emulator()
    yield made
    made.close()


@pytest.mark.parametrize("rows", [1, 33])
def test_both_runtimes_run_a_cuda_bundle_on_the_device(
    emulator: Emulator, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = tiny.feeds(rows)
    found = emulator.run(run_tiny, str(tmp_path), rows)
    # The emulated driver and CUDA runtime come first for the native runner.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(emulator._folder.name))
    native = run_bundle(tmp_path / "a.kbit", feeds, options=["--device", "cuda"]).outputs
    for name, array in tiny.expected(feeds["x"]).items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(native[name], array)


def as_sm_80(raw: dict[str, Any]) -> None:
    """Make a manifest say that its module is for another GPU."""
    raw["target"].update(name="cuda:sm_80", arch="sm_80")
    raw["variants"][0]["target"] = "cuda:sm_80"


def test_another_gpu_is_refused_naming_both(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.run(run_tiny, str(tmp_path), 1)
    tamper.forge(as_sm_80)(tmp_path / "a.kbit")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(emulator._folder.name))
    with pytest.raises(BundleError, match="cuda:sm_80 needs an NVIDIA GPU of sm_80, this machine has sm_90"):
        run_bundle(tmp_path / "a.kbit", tiny.feeds())


def test_without_a_driver_a_cuda_bundle_is_refused(emulator: Emulator, tmp_path: Path) -> None:
    if not isinstance(machine.cuda_capability(), str):
        pytest.skip("this machine has a GPU")
    emulator.run(run_tiny, str(tmp_path), 1)
    with pytest.raises(BundleError, match="cuda:sm_90 needs an NVIDIA GPU of sm_90"):
        load(tmp_path / "a.kbit")
    with pytest.raises(BundleError, match="cuda:sm_90 needs an NVIDIA GPU of sm_90"):
        run_bundle(tmp_path / "a.kbit", tiny.feeds())
