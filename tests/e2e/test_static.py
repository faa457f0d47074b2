"""Real models with static activations: the module gives the very integers on every instruction set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tasks import Task

import kbitc
from kbitc.targets.runner.execute import run_bundle

pytestmark = pytest.mark.slow
Compile = Callable[..., Path]


def digest(outputs: Mapping[str, Any]) -> str:
    """SHA-256 over all integer tensors in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(outputs):
        if outputs[name].dtype in (np.uint8, np.int32):
            total.update(f"{name} {outputs[name].shape}".encode() + outputs[name].tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory, task: Callable[[str], Task]) -> Compile:
    """`static("cls", target, integer_only)`: compiled with every integer tensor as an output."""
    folder = tmp_path_factory.mktemp("static")

    def get(name: str, target: str, integer_only: bool) -> Path:
        own = task(name)
        bundle = folder / f"{name}-{target.replace(':', '-')}-{len(list(folder.iterdir()))}.kbit"
        kbitc.compile(
            own.model, bundle, bits=8, target=target, shapes=own.shapes, integer_only=integer_only,
            activations=None if integer_only else "static", calibration=own.calibration, debug_accumulators=True,
        )  # fmt: skip
        return bundle

    return get


@pytest.mark.parametrize("integer_only", [False, True])
@pytest.mark.parametrize("name", ["cls", "magika", "minilm"])
def test_every_integer_is_the_same(
    name: str, integer_only: bool, static: Compile, task: Callable[[str], Task]
) -> None:  # fmt: skip
    feeds = {key: np.ascontiguousarray(array[:1]) for key, array in task(name).batches[0].items()}
    wanted = kbitc.load(static(name, "x86:avx512vnni", integer_only))(feeds)
    assert sum(array.dtype in (np.uint8, np.int32) for array in wanted.values()) > 5
    assert digest(kbitc.load(static(name, "x86:avx2", integer_only))(feeds)) == digest(wanted)
    assert digest(run_bundle(static(name, "arm-neon", integer_only), feeds).outputs) == digest(wanted)
