"""The real models for ARM NEON, run by kbitc-run under qemu-user; the integers are x86's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tasks import Task

import kbitc
from kbitc.passes.verify.accuracy import LOWERING_CEILING_DB
from kbitc.quant.metrics import compare
from kbitc.targets.runner.execute import run_bundle

pytestmark = pytest.mark.slow
CASES = [(name, bits) for name in ("cls", "magika", "minilm", "rec") for bits in (8, 5, 4, 3)]


def one_sample(task: Task) -> dict[str, Any]:
    """A small real input: emulation is some fifty times slower than a processor."""
    return {name: np.ascontiguousarray(array[:1]) for name, array in task.batches[0].items()}


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_module_on_neon_gives_what_x86_gives(
    name: str, bits: int, task: Callable[[str], Task], compiled: Callable[..., Any]
) -> None:
    """Codes and int32 accumulators are equal; the outputs agree as far as float sums do."""
    feeds = one_sample(task(name))
    here = kbitc.load(compiled(name, bits, "x86", debug=True).bundle)(feeds)
    there = run_bundle(compiled(name, bits, "arm-neon", debug=True).bundle, feeds).outputs
    assert set(here) == set(there)

    layers = [output.removesuffix(".accumulators") for output in here if output.endswith(".accumulators")]
    assert layers
    different = [layer for layer in layers if not np.array_equal(here[f"{layer}.codes"], there[f"{layer}.codes"])]
    assert different == [], f"{len(different)} of {len(layers)} layers got other int8 codes"
    for layer in layers:
        assert np.array_equal(here[f"{layer}.accumulators"], there[f"{layer}.accumulators"]), layer
    outputs = [output for output in here if not output.endswith((".accumulators", ".codes"))]
    found = compare([{o: here[o] for o in outputs}], [{o: there[o] for o in outputs}])
    assert all(accuracy.sqnr_db >= LOWERING_CEILING_DB for accuracy in found.values())
