"""Integer matrix products and convolutions with AVX2."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import kernels
from tests.support.kernels import Case
from tests.support.products import AVX2, CASES, CONVOLUTIONS, VNNI, check, compiled, need, results


@pytest.mark.parametrize("case", [*CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    need(AVX2)
    check(case, results(AVX2))


def test_floats_are_those_of_vnni_bit_for_bit() -> None:
    for target_name in (AVX2, VNNI):
        need(target_name)
    for case in (*CASES, *CONVOLUTIONS):
        np.testing.assert_array_equal(results(AVX2)[case.name], results(VNNI)[case.name], err_msg=case.name)


def test_build_never_saturates() -> None:
    assembly = compiled(AVX2).assembly()
    hot = kernels.hot_blocks(assembly, "vpmaddwd")
    assert hot and all("call" not in block for block in hot)
    assert "vpmaddubsw" not in assembly and "%zmm" not in assembly
