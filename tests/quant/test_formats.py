"""Every value of every data type."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.format import Format
from kbitc.quant.scheme import FORMATS


def _all_formats() -> list[Format]:
    made = []
    for name in catalog.names(FORMATS):
        for bits in range(1, 9):
            try:
                made.append(catalog.find(FORMATS, name, "data type").make(bits))
            except UsageError:
                continue
    return made


ALL = _all_formats()
IDS = [f"{item.name}{item.bits}" for item in ALL]


def test_the_catalogue_holds_the_first_day_formats() -> None:
    assert {"int4", "int1", "int8", "uint4", "uint8", "nf4", "nf2", "nf7"} <= set(IDS)


@pytest.mark.parametrize("data_type", ALL, ids=IDS)
def test_every_level_encodes_to_its_own_code(data_type: Format) -> None:
    codes = np.arange(2**data_type.bits, dtype=np.uint8)
    levels = data_type.decode(codes)
    assert levels.dtype == np.int8
    np.testing.assert_array_equal(data_type.encode(levels.astype(np.float32)), codes)


@pytest.mark.parametrize("data_type", ALL, ids=IDS)
def test_encode_gives_a_nearest_level(data_type: Format) -> None:
    values = np.linspace(-140, 140, 56001, dtype=np.float32)
    grid = data_type.grid.astype(np.float32)
    found = grid[data_type.encode(values)]
    nearest = np.abs(values[:, None] - grid).min(axis=1)
    np.testing.assert_array_equal(np.abs(values - found), nearest)


@pytest.mark.parametrize("data_type", ALL, ids=IDS)
def test_encode_saturates(data_type: Format) -> None:
    codes = data_type.encode(np.array([-1e30, 1e30], np.float32))
    np.testing.assert_array_equal(codes, [0, 2**data_type.bits - 1])


def test_ties_between_uniform_levels_go_to_even() -> None:
    int4 = catalog.find(FORMATS, "int", "data type").make(4)
    np.testing.assert_array_equal(int4.decode(int4.encode(np.array([0.5, 1.5, -0.5, -2.5], np.float32))), [0, 2, 0, -2])


def test_nf4_is_the_published_table() -> None:
    """QLoRA, arXiv 2305.14314, appendix E, within half a step of the int8 grid."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    levels = catalog.find(FORMATS, "nf", "data type").make(4).levels
    assert np.abs(np.array(levels) - 127 * np.array(published)).max() <= 0.5


def test_a_misspelled_data_type_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean uint or int"):
        catalog.find(FORMATS, "unit", "data type")
