"""Running what was compiled for another processor; skips where this machine lacks the tools (fails in CI)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import pytest

from kbitc.bundle.manifest import Described
from kbitc.errors import ResourceError
from kbitc.targets.runner.build import runner_folder
from kbitc.targets.runner.execute import Outcome, emulation, run_library
from kbitc.targets.target import Target, parse_target


def need_runner(target: str) -> Target:
    """The target, when kbitc-run for it can be built and run here, natively or under qemu; else the test is skipped."""
    parsed = parse_target(target)
    try:
        emulation(parsed.machine)
        runner_folder(parsed.machine)
    except ResourceError as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"CI must have it: {error}")
        pytest.skip(str(error))
    return parsed


def run_on(
    target: Target,
    library: bytes,
    weights: Mapping[str, npt.NDArray[Any]],
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    feeds: Mapping[str, npt.NDArray[Any]],
    cpu: str = "max",
) -> Outcome:
    """Run a library through a bundle and kbitc-run, under qemu when it is for another processor."""
    return run_library(target, library, weights, inputs, outputs, feeds, cpu=cpu)
