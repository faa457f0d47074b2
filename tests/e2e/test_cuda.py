"""The real models for CUDA: machine code without a GPU, run where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tasks import Task

import kbitc
from kbitc.passes.verify.accuracy import LOWERING_CEILING_DB
from kbitc.quant.metrics import compare
from kbitc.targets.target import host_runs, parse_target

CASES = [
    pytest.param(name, bits, marks=[] if (name, bits) == ("cls", 4) else pytest.mark.slow)
    for name in ("cls", "magika", "minilm", "rec")
    for bits in (8, 5, 4, 3)
]
TARGET = "cuda:sm_90"


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_bundle_holds_machine_code_with_integer_dot_products(
    name: str, bits: int, compiled: Callable[..., Any]
) -> None:
    from kbitc.targets.cuda.inspection import inspect, instructions

    made = compiled(name, bits, TARGET)
    library: Path = made.bundle / "module.so"
    facts = inspect(library)
    assert facts.cubins and not facts.has_source
    integer_layers = [weight for weight in made.report.weights if weight.entry.activation == "int8"]
    opcodes = {opcode.split(".")[0] for kernel in instructions(library).values() for opcode in kernel}
    assert not integer_layers or {"IDP", "IMMA"} & opcodes
    assert integer_layers or made.report.weights


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_it_runs_where_there_is_a_gpu(
    name: str, bits: int, compiled: Callable[..., Any], task: Callable[[str], Task]
) -> None:
    reason = host_runs(parse_target(TARGET))
    if reason is not None:
        pytest.skip(reason)
    feeds = [dict(task(name).batches[0])]
    on_gpu = [kbitc.load(compiled(name, bits, TARGET).bundle)(feeds[0])]
    on_cpu = [kbitc.load(compiled(name, bits, "x86").bundle)(feeds[0])]
    assert all(found.sqnr_db >= LOWERING_CEILING_DB for found in compare(on_cpu, on_gpu).values())
