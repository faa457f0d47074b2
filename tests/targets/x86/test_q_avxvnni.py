"""Integer matrix products and convolutions with AVX-VNNI.

Where the processor lacks it, the same kernels run as AVX512-VNNI on ymm registers: LLVM then encodes vpdpbusd by EVEX.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from kbitc.targets.target import Target, host_runs, parse_target
from tests.support import kernels
from tests.support.kernels import Case, Compiled
from tests.support.products import CASES, CONVOLUTIONS, VNNI, check, need, results

AVXVNNI = "x86:avxvnni"


def runnable() -> Target:
    """The target, with instructions of the same meaning where this machine lacks its own."""
    target = parse_target(AVXVNNI)
    if host_runs(target) is None:
        return target
    need(VNNI)
    other = parse_target(VNNI)
    return replace(target, tvm_fields=other.tvm_fields, cpu_features=other.cpu_features)


@cache
def compiled() -> Compiled:
    return kernels.compile_cases((*CASES, *CONVOLUTIONS), runnable())


@cache
def found() -> dict[str, np.ndarray]:
    return compiled().run()


@pytest.mark.parametrize("case", [*CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    check(case, found())


def test_floats_are_those_of_vnni_bit_for_bit() -> None:
    for case in (*CASES, *CONVOLUTIONS):
        np.testing.assert_array_equal(found()[case.name], results(VNNI)[case.name], err_msg=case.name)


def test_build_uses_vpdpbusd_on_ymm_by_vex() -> None:
    case = next(case for case in CASES if case.name == "rows7")
    assembly = kernels.compile_cases([case], parse_target(AVXVNNI)).assembly()
    hot = kernels.hot_blocks(assembly, "vpdpbusd")
    assert hot and all("call" not in block for block in hot)
    lines = [line for block in hot for line in block.splitlines() if "vpdpbusd" in line]
    assert all("{vex}" in line and "%ymm" in line for line in lines)
    assert "%zmm" not in assembly and "%k1" not in assembly and "%ymm16" not in assembly
