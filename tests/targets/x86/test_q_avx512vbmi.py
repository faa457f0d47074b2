"""Integer matrix products and convolutions with AVX512-VBMI."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.targets.target import parse_target
from tests.support import kernels
from tests.support.kernels import Case
from tests.support.products import CASES, CONVOLUTIONS, MORE_CASES, VBMI, VNNI, check, need, results


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    need(VBMI)
    check(case, results(VBMI))


def test_floats_are_those_of_vnni_bit_for_bit() -> None:
    for target_name in (VBMI, VNNI):
        need(target_name)
    for case in (*CASES, *MORE_CASES, *CONVOLUTIONS):
        np.testing.assert_array_equal(results(VBMI)[case.name], results(VNNI)[case.name], err_msg=case.name)


def test_codes_go_to_look_ups_without_a_mask() -> None:
    case = next(case for case in CASES if case.name == "table4")
    assembly = kernels.compile_cases([case], parse_target(VBMI)).assembly()
    assert "vpermb" in assembly and "vpshufb" not in assembly
    hot = kernels.hot_blocks(assembly, "vpdpbusd")
    assert hot and all("vpand" not in block and "call" not in block for block in hot)
