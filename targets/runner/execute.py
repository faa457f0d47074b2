"""Runs a bundle with kbitc-run: on this machine, or under qemu when it is for another processor."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.bundle.manifest import Described
from kbitc.bundle.reader import read_manifest
from kbitc.bundle.writer import Compiled, write_bundle
from kbitc.errors import BundleError, CalibrationError, InternalError, KbitcError, ResourceError, UsageError
from kbitc.targets import machine
from kbitc.targets.runner.build import RUNNER, runner_folder
from kbitc.targets.target import Target

TIMEOUT_SECONDS = 1800
SYSROOTS = {"aarch64": "/usr/aarch64-linux-gnu", "x86_64": "/usr/x86_64-linux-gnu"}
QEMU = {"aarch64": ("qemu-aarch64", "qemu-aarch64-static"), "x86_64": ("qemu-x86_64", "qemu-x86_64-static")}
_ERRORS: dict[int, type[KbitcError]] = {
    kind.exit_code: kind for kind in (UsageError, CalibrationError, ResourceError, BundleError)
}


@dataclass(frozen=True)
class Outcome:
    """What one start of kbitc-run gave.

    Attributes:
        outputs: output name -> array.
        load_ms: milliseconds to check and load the bundle.
        min_ms: least time of a run; under qemu it says nothing about a real machine.
        median_ms: median time of a run.
    """

    outputs: dict[str, npt.NDArray[Any]]
    load_ms: float
    min_ms: float
    median_ms: float


def emulation(architecture: str, cpu: str = "max") -> list[str]:
    """What goes before a program for an architecture: nothing here, qemu and its options elsewhere.

    Args:
        architecture: "x86_64" or "aarch64".
        cpu: processor that qemu imitates, such as "cortex-a76"; "max" has every feature.

    Raises:
        ResourceError: when qemu or the C library of that architecture is missing.
    """
    if architecture == machine.architecture():
        return []
    qemu = machine.tool(*QEMU.get(architecture, ()))
    sysroot = Path(SYSROOTS.get(architecture, "/nonexistent"))
    if qemu is None:
        raise ResourceError(f"no emulator for {architecture} is installed", remedy="apt-get install qemu-user")
    if not sysroot.is_dir():
        package = "g++-aarch64-linux-gnu" if architecture == "aarch64" else "g++-x86-64-linux-gnu"
        raise ResourceError(f"the C library for {architecture} is missing", remedy=f"apt-get install {package}")
    return [qemu, "-cpu", cpu, "-L", str(sysroot)]


def run_bundle(
    bundle: Path,
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    threads: int = 1,
    repeat: int = 1,
    cpu: str = "max",
    options: Sequence[str] = (),
) -> Outcome:
    """Run a bundle with kbitc-run in a process of its own.

    Args:
        bundle: the folder NAME.kbit; the machine it is for decides whether qemu is used.
        feeds: input name -> array.
        threads: threads of one run.
        repeat: runs that are timed.
        cpu: processor that qemu imitates.
        options: further options of kbitc-run.

    Raises:
        KbitcError: what kbitc-run refused, as the error of its exit code.
        ResourceError: when the runner cannot be built or qemu is missing.
    """
    architecture = read_manifest(bundle).target.machine
    program = [*emulation(architecture, cpu), str(runner_folder(architecture) / RUNNER)]
    with tempfile.TemporaryDirectory(prefix="kbitc-run-") as folder:
        inputs, outputs = Path(folder) / "feeds.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, **dict(feeds))  # type: ignore[arg-type]
        numbers = ["--threads", str(threads), "--repeat", str(repeat)]
        files = ["--input", str(inputs), "--output", str(outputs)]
        text = _run([*program, str(bundle), *files, *numbers, "--json", *options])
        report = json.loads(text)
        with np.load(outputs) as archive:
            arrays = {name: archive[name] for name in archive.files}
    return Outcome(arrays, report["load_ms"], report["min_ms"], report["median_ms"])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{RUNNER} could not be run", got=str(error)) from error
    if done.returncode == 0:
        return done.stdout
    message = done.stderr.strip().removeprefix(f"{RUNNER}: error: ") or f"exit code {done.returncode}"
    raise _ERRORS.get(done.returncode, InternalError)(message)


def run_library(
    target: Target,
    library: bytes,
    weights: Mapping[str, npt.NDArray[Any]],
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    threads: int = 1,
    repeat: int = 1,
    cpu: str = "max",
) -> Outcome:
    """Run a compiled library that is in no bundle yet; arguments as for `write_bundle` and `run_bundle`."""
    with tempfile.TemporaryDirectory(prefix="kbitc-library-") as folder:
        bundle = Path(folder) / "library.kbit"
        write_bundle(bundle, [Compiled(target, library, weights)], inputs, outputs, kbitc_version="0", report={})
        return run_bundle(bundle, feeds, threads=threads, repeat=repeat, cpu=cpu)
