"""kbitc-run on this machine and, when the tools are here, on 64-bit ARM under qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kbitc.bundle.runtime import load
from kbitc.errors import BundleError, CalibrationError, UsageError
from kbitc.targets import machine
from kbitc.targets.runner.build import runner_folder
from kbitc.targets.runner.deploy import with_runtime
from kbitc.targets.runner.execute import emulation, run_bundle, run_library
from tests.support import tamper, tiny
from tests.support.qemu import need_runner


@pytest.fixture(scope="module")
def runner() -> str:
    need_runner("reference")
    return str(runner_folder(machine.architecture()) / "kbitc-run")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    extra = {"lib/extra.so": b"not a library"}
    return tiny.compile_tiny("reference").write(tmp_path / "tiny.kbit", runtime_files=extra)


@pytest.fixture
def feeds_file(tmp_path: Path) -> str:
    np.savez(tmp_path / "x.npz", **tiny.feeds())
    return str(tmp_path / "x.npz")


def run(runner: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([runner, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def test_agrees_with_the_python_runtime(runner: str, bundle: Path) -> None:
    for rows in (1, 5, 64):
        feeds = tiny.feeds(rows)
        expected = load(bundle)(feeds)
        outputs = run_bundle(bundle, feeds, threads=2).outputs
        assert list(outputs) == list(expected)
        for name, array in expected.items():
            assert outputs[name].dtype == array.dtype
            np.testing.assert_array_equal(outputs[name], array)


@pytest.mark.parametrize("cpu", ["max", "cortex-a76", "neoverse-n1"])
def test_agrees_on_arm(cpu: str) -> None:
    target = need_runner("arm-neon:dotprod")
    here, there = tiny.compile_tiny("reference"), tiny.compile_tiny(target.name)
    feeds = tiny.feeds(9)
    found = run_library(target, there.library, there.weights, tiny.INPUTS, tiny.OUTPUTS, feeds, cpu=cpu)
    for name, array in here.expected(feeds["x"]).items():
        np.testing.assert_array_equal(found.outputs[name], array)


def test_an_arm_processor_without_dotprod_is_refused_naming_it() -> None:
    target = need_runner("arm-neon:dotprod")
    there = tiny.compile_tiny(target.name)
    with pytest.raises(BundleError, match="needs the processor feature asimddp"):
        run_library(target, there.library, there.weights, tiny.INPUTS, tiny.OUTPUTS, tiny.feeds(), cpu="cortex-a72")


def test_a_deployed_folder_runs_by_itself(tmp_path: Path) -> None:
    """Copied elsewhere, without Python and without the packages of this environment."""
    target = need_runner("arm-neon:dotprod")
    tiny.compile_tiny(target.name).write(tmp_path / "a.kbit", runtime_files=with_runtime(target))
    copy = tmp_path / "device" / "b.kbit"
    shutil.copytree(tmp_path / "a.kbit", copy)
    shutil.rmtree(tmp_path / "a.kbit")
    np.save(tmp_path / "x.npy", tiny.feeds()["x"])
    command = [*emulation(target.machine), copy / "kbitc-run", copy, "--input", tmp_path / "x.npy", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == target.name


@pytest.mark.parametrize("way", tamper.WAYS, ids=str)
def test_a_damaged_bundle_is_refused(runner: str, bundle: Path, feeds_file: str, way: str) -> None:
    tamper.WAYS[way](bundle)
    done = run(runner, bundle, "--input", feeds_file)
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr.startswith("kbitc-run: error: ")
    assert done.stderr.count("\n") == 1


def test_a_damaged_bundle_is_refused_on_arm(tmp_path: Path) -> None:
    target = need_runner("arm-neon:dotprod")
    out = tiny.compile_tiny(target.name).write(tmp_path / "a.kbit")
    tamper.flip("weights.safetensors", 1)(out)
    with pytest.raises(BundleError, match="SHA-256"):
        run_bundle(out, tiny.feeds())


@pytest.mark.parametrize("name", ["reference", "arm-neon:dotprod"])
def test_files_of_every_length_have_the_right_hash(tmp_path: Path, name: str) -> None:
    """Around the 64-byte blocks of SHA-256, with the processor's instructions and in plain C++."""
    target = need_runner(name)
    rng = np.random.default_rng(0)
    files = {f"f{n}": rng.bytes(n) for n in [*range(130), 1000, 2**20 - 1, 2**20, 2**20 + 65]}
    out = tiny.compile_tiny(target.name).write(tmp_path / "a.kbit", runtime_files=files)
    assert run_bundle(out, tiny.feeds()).outputs


def test_a_bundle_for_another_machine_is_refused_naming_both(runner: str, tmp_path: Path, feeds_file: str) -> None:
    other = "arm-neon" if machine.architecture() == "x86_64" else "x86:avx2"
    target = need_runner(other)
    out = tiny.compile_tiny(target.name).write(tmp_path / "a.kbit")
    done = run(runner, out, "--input", feeds_file)
    assert done.returncode == 8
    assert f"is for {target.machine}, this machine is {machine.architecture()}" in done.stderr


def test_every_bit_of_a_small_manifest_counts(runner: str, bundle: Path, feeds_file: str) -> None:
    data = (bundle / "manifest.json").read_bytes()
    for at in range(0, len(data), 37):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        (bundle / "manifest.json").write_bytes(changed)
        assert run(runner, bundle, "--input", feeds_file).returncode == 8, at


def test_no_verify_skips_the_hashes_only(runner: str, bundle: Path, feeds_file: str) -> None:
    tamper.flip("report.json", 0.5)(bundle)
    assert run(runner, bundle, "--input", feeds_file, "--no-verify").returncode == 0
    tamper.cut("module.so", 0.5)(bundle)
    assert run(runner, bundle, "--input", feeds_file, "--no-verify").returncode == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no bundle was given"),
        (["a.kbit"], "--input is missing"),
        (["a.kbit", "--input"], "--input needs a value"),
        (["a.kbit", "b.kbit", "--input", "x"], "one bundle at a time"),
        (["a.kbit", "--input", "x", "--thread", "1"], "unknown option --thread"),
        (["a.kbit", "--input", "x", "--threads", "0"], "--threads takes a number of at least 1"),
        (["a.kbit", "--input", "x", "--repeat", "2x"], "--repeat takes a number"),
        (["a.kbit", "--input", "x", "--device", "gpu"], "unknown device"),
    ],
)
def test_wrong_usage(runner: str, arguments: list[str], message: str) -> None:
    done = run(runner, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_help_and_version(runner: str) -> None:
    assert "usage: kbitc-run BUNDLE" in run(runner, "--help").stdout
    assert "apache-tvm 0.27" in run(runner, "--version").stdout


def test_a_cpu_bundle_is_not_run_on_a_gpu(bundle: Path) -> None:
    need_runner("reference")
    with pytest.raises(UsageError, match="--device cuda"):
        run_bundle(bundle, tiny.feeds(), options=["--device", "cuda"])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"X": np.zeros((2, 8), np.float32)}, "no such input .*'X'.*known: x"),
        ({}, "missing .*x.*float32\\[n, 8\\]"),
        ({"x": np.zeros((2, 8))}, "wrong dtype .*float64\\[2, 8\\]"),
        ({"x": np.zeros(8, np.float32)}, "wrong number of dims .*float32\\[8\\]"),
        ({"x": np.zeros((2, 9), np.float32)}, "wrong shape .*float32\\[2, 9\\]"),
    ],
)
def test_inputs_that_do_not_fit(bundle: Path, feeds: dict[str, np.ndarray], message: str) -> None:
    need_runner("reference")
    with pytest.raises(CalibrationError, match=message):
        run_bundle(bundle, feeds)


def test_unwritable_output_and_missing_input(runner: str, bundle: Path, feeds_file: str, tmp_path: Path) -> None:
    assert run(runner, bundle, "--input", tmp_path / "none.npz").returncode == 7
    done = run(runner, bundle, "--input", feeds_file, "--output", tmp_path / "no" / "y.npz")
    assert done.returncode == 7
    assert "cannot write the outputs" in done.stderr


def test_timings_are_plausible(runner: str, bundle: Path, feeds_file: str) -> None:
    done = run(runner, bundle, "--input", feeds_file, "--repeat", 5, "--warmup", 2, "--json")
    report = json.loads(done.stdout)
    assert report["repeat"] == 5
    assert 0 < report["min_ms"] <= report["median_ms"] < 1000
    assert report["outputs"][0] == {"name": "y", "dtype": "float32", "shape": [5, 16]}
