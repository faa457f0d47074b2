"""Integer matrix products and convolutions with NEON dotprod, under qemu on a Cortex-A76."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import kernels
from tests.support.kernels import Case
from tests.support.products import CASES, CONVOLUTIONS, NEON, VNNI, check, compiled, need, results


@pytest.mark.parametrize("case", [*CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    need(NEON)
    check(case, results(NEON))


def test_floats_are_those_of_vnni_bit_for_bit() -> None:
    for target_name in (NEON, VNNI):
        need(target_name)
    for case in (*CASES, *CONVOLUTIONS):
        np.testing.assert_array_equal(results(NEON)[case.name], results(VNNI)[case.name], err_msg=case.name)


def test_build_uses_sdot() -> None:
    hot = kernels.hot_blocks(compiled(NEON).assembly(), "sdot")
    assert hot and all("\tbl\t" not in block for block in hot)
