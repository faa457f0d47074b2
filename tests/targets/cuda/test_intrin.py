"""The meaning that each instruction file gives in numpy, and the table look-up that is built from prmt."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.targets.cuda.intrin import dp4a, mma, prmt


def test_dp4a_wraps_and_never_saturates() -> None:
    low = np.array([-2139062144], np.int32)  # four times -128
    top = np.array([2**31 - 1], np.int32)
    assert dp4a.dp4a_means(low, low, np.zeros(1, np.int32)) == 4 * 128 * 128
    assert dp4a.dp4a_means(low, low, top) == 4 * 128 * 128 - 2**31 - 1
    mixed = np.array([1, -2, 3, -4], np.int8).view(np.int32)
    assert dp4a.dp4a_means(mixed, mixed, np.array([5], np.int32)) == 35


@pytest.mark.parametrize("code", range(16))
def test_four_registers_are_a_table_of_sixteen(code: int) -> None:
    table = np.array([-127, -88, -66, -50, -36, -23, -11, 0, 10, 20, 31, 42, 55, 71, 91, 127], np.int8)
    words = prmt.table_words(table)
    selector = (code & 7) * 0x1111
    low, high = prmt.prmt_means(words[0], words[1], selector), prmt.prmt_means(words[2], words[3], selector)
    found = prmt.prmt_means(low, high, 0x3210 | (code >> 3) * 0x4444)
    assert np.array([found], np.uint32).view(np.int8).tolist() == [table[code]] * 4


def test_prmt_repeats_the_sign_when_bit_three_of_a_selector_is_set() -> None:
    assert prmt.prmt_means(0x80_7F_00_01, 0, 0xBA98) == 0xFF000000


def test_mma_is_a_product_of_signed_bytes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    assert np.array_equal(mma.mma_means(a, b, c), c + a.astype(int) @ b.astype(int))
