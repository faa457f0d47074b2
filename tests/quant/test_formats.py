"""Every value of every data type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.format import Format
from kbitc.quant.formats import kmeans, quantile
from kbitc.quant.scheme import FORMATS


def _all_formats() -> dict[str, Format]:
    made = {}
    for name in catalog.names(FORMATS):
        module = catalog.find(FORMATS, name, "data type")
        for bits in range(1, 9):
            try:
                if not hasattr(module, "variants"):
                    made[f"{name}{bits}"] = module.make(bits)
                    continue
                for variant in module.variants(bits):
                    made[f"{name}{bits}-{variant}"] = module.make(bits, variant)
            except UsageError:
                continue
    return made


ALL = _all_formats()
every_format = pytest.mark.parametrize("data_type", ALL.values(), ids=ALL)


def _make(name: str, bits: int, *variant: str) -> Format:
    made: Format = catalog.find(FORMATS, name, "data type").make(bits, *variant)
    return made


def test_the_catalogue_holds_every_family_at_every_width_that_makes_sense() -> None:
    widths = {"int": (1, 8), "uint": (1, 8), "nf": (2, 7), "quantile": (2, 7), "kmeans": (2, 7), "dynexp": (2, 8)}
    expected = {f"{name}{bits}" for name, (low, high) in widths.items() for bits in range(low, high + 1)}
    expected |= {"fp2-e1m0", "fp4-e2m1", "fp4-e1m2", "fp4-e3m0", "fp6-e2m3", "fp6-e3m2", "fp8-e4m3", "fp8-e5m2"}
    expected |= {"log22-r1", "log24-r1", "log24-r2", "log28-r16"}
    assert expected <= set(ALL)


@every_format
def test_every_level_encodes_to_a_code_of_its_own_value(data_type: Format) -> None:
    codes = np.arange(2**data_type.bits, dtype=np.uint8)
    levels = data_type.decode(codes)
    assert levels.dtype == np.int8
    again = data_type.encode(levels.astype(np.float32))
    np.testing.assert_array_equal(data_type.decode(again), levels)
    first_of_equals = np.concatenate([[True], np.diff(levels.astype(int)) > 0])
    np.testing.assert_array_equal(again[first_of_equals], codes[first_of_equals])


@every_format
def test_encode_gives_a_nearest_level(data_type: Format) -> None:
    values = np.linspace(-140, 140, 56001, dtype=np.float32)
    grid = data_type.grid.astype(np.float32)
    found = grid[data_type.encode(values)]
    nearest = np.abs(values[:, None] - grid).min(axis=1)
    np.testing.assert_array_equal(np.abs(values - found), nearest)


@every_format
def test_encode_saturates(data_type: Format) -> None:
    levels = data_type.decode(data_type.encode(np.array([-1e30, 1e30], np.float32)))
    np.testing.assert_array_equal(levels, [data_type.levels[0], data_type.levels[-1]])


@every_format
def test_the_scale_for_a_range_clips_nothing(data_type: Format) -> None:
    if data_type.asymmetric:
        return
    low, high = np.array([-3.0, 0.0, -1.0, 0.0], np.float32), np.array([1.0, 5.0, 1.0, 0.0], np.float32)
    scales = data_type.scale_for(low, high)
    reach = (-data_type.peak, data_type.peak) if data_type.peak else (data_type.levels[0], data_type.levels[-1])
    assert (scales * reach[0] <= low * (1 - 1e-6)).all() and (scales * reach[1] >= high * (1 - 1e-6)).all()
    assert scales[3] == 0


def test_ties_between_uniform_levels_go_to_even() -> None:
    int4 = _make("int", 4)
    np.testing.assert_array_equal(int4.decode(int4.encode(np.array([0.5, 1.5, -0.5, -2.5], np.float32))), [0, 2, 0, -2])


def test_nf4_is_the_published_table() -> None:
    """QLoRA, arXiv 2305.14314, appendix E, within half a step of the int8 grid."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert np.abs(np.array(_make("nf", 4).levels) - 127 * np.array(published)).max() <= 0.5


FLOAT_TYPES = {
    ("fp4-e2m1"): ml_dtypes.float4_e2m1fn,
    ("fp6-e2m3"): ml_dtypes.float6_e2m3fn,
    ("fp6-e3m2"): ml_dtypes.float6_e3m2fn,
    ("fp8-e4m3"): ml_dtypes.float8_e4m3fn,
    ("fp8-e5m2"): ml_dtypes.float8_e5m2,
    ("fp8-e3m4"): None,
}


@pytest.mark.parametrize("name", [name for name in FLOAT_TYPES if FLOAT_TYPES[name] is not None])
def test_small_floats_are_those_of_the_standard(name: str) -> None:
    """Each finite value of the type, in units of the largest, lies within half a step of the int8 grid."""
    bits = ALL[name].bits
    values = np.arange(2**bits, dtype=np.uint8).view(FLOAT_TYPES[name]).astype(np.float64)
    values = np.sort(values[np.isfinite(values)])
    levels = np.array(ALL[name].levels, float)
    # Codes that are no numbers repeat the outermost level.
    spare = (len(levels) - len(values)) // 2
    unit = levels[-1] / values[-1]
    assert np.abs(levels[spare : len(levels) - spare] - unit * values).max() <= 0.5
    assert (levels[:spare] == levels[0]).all() and (levels[len(levels) - spare :] == levels[-1]).all()


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("fp4-e2m1", (0, 1, 2, 3, 4, 6, 8, 12)),  # twice {0, 0.5, 1, 1.5, 2, 3, 4, 6}
        ("fp3-e2m0", (0, 1, 2, 4)),
        ("fp2-e1m0", (0, 1)),
        ("fp4-e3m0", (0, 1, 2, 4, 8, 16, 32, 64)),
        ("log24-r1", (0, 1, 2, 4, 8, 16, 32, 64)),
        ("log23-r1", (0, 1, 2, 4)),
    ],
)
def test_exact_tables_are_small_integers(name: str, positive: tuple[int, ...]) -> None:
    assert ALL[name].levels == (*(-level for level in reversed(positive)), *positive)


def test_exact_small_floats_are_exactly_those_with_a_ratio_of_at_most_127() -> None:
    """The smallest positive level is 1, and doubling a level below half the largest is a level."""
    exact = {name for name, item in ALL.items() if name.startswith("fp") and len(set(item.levels)) == 2**item.bits - 1}
    named = {f"fp{2 + m}-e1m{m}" for m in range(7)} | {f"fp{3 + m}-e2m{m}" for m in range(5)} | {"fp4-e3m0"}
    assert exact == named


def test_dynamic_exponent_of_four_bits_is_the_published_one() -> None:
    """bitsandbytes' create_dynamic_map(signed, 3 exponent bits, 4 bits), by its definition."""
    fractions = [0.2125, 0.4375, 0.6625, 0.8875, 0.0325, 0.0775, 0.0055]
    values = sorted([*fractions, *(-value for value in fractions), 0.0, 1.0])
    assert np.abs(np.array(_make("dynexp", 4).levels) - 127 * np.array(values)).max() <= 0.5


def test_the_base_of_powers_of_two_can_be_chosen() -> None:
    levels = np.array(_make("log2", 4, "r2").levels, float)
    np.testing.assert_allclose(levels[9:], 127 * 2.0 ** -(np.arange(6, -1, -1) / 2), atol=0.5)
    with pytest.raises(UsageError, match="1 bit|2 to 8 bits"):
        catalog.find(FORMATS, "log2", "data type").variants(1)


def test_quantiles_give_every_level_equally_many_weights() -> None:
    ratio = np.random.default_rng(0).uniform(-127, 127, 4096).astype(np.float32)
    made = quantile.fit(3, ratio, None)
    np.testing.assert_allclose(made.levels, np.linspace(-127, 127, 17)[1::2], atol=4)


def _best_by_search(ratio: np.ndarray, weight: np.ndarray, candidates: range) -> float:
    """Least weighted error of all 4-level tables with levels among the candidates."""
    from itertools import combinations

    return min(_error(ratio, weight, table) for table in combinations(candidates, 4))


def _error(ratio: np.ndarray, weight: np.ndarray, table: tuple[int, ...]) -> float:
    nearest = np.abs(ratio[:, None] - np.array(table, float)).min(axis=1)
    return float((weight * nearest**2).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_the_best_table_there_is(weighted: bool) -> None:
    rng = np.random.default_rng(5)
    ratio = np.clip(rng.normal(0, 4, 60), -9, 9).astype(np.float32)
    weight = rng.uniform(0, 3, 60).astype(np.float32) if weighted else np.ones(60, np.float32)
    made = kmeans.fit(2, ratio, weight if weighted else None)
    best = _best_by_search(ratio.astype(np.float64), weight.astype(np.float64), range(-9, 10))
    assert _error(ratio.astype(np.float64), weight.astype(np.float64), made.levels) == pytest.approx(best, rel=1e-9)


def test_kmeans_weighs_by_importance() -> None:
    ratio = np.array([-100, -50, 0, 50, 100], np.float32)
    made = kmeans.fit(2, ratio, np.array([1, 1e-6, 1, 1, 1], np.float32))
    assert set(made.levels) == {-100, 0, 50, 100}


@pytest.mark.parametrize("name", ["kmeans", "quantile"])
@pytest.mark.parametrize("bits", range(2, 8))
def test_learned_tables_of_constant_weights_are_tables(name: str, bits: int) -> None:
    for value in (0.0, 127.0, -127.0):
        made = catalog.find(FORMATS, name, "data type").fit(bits, np.full((3, 1, 5), value, np.float32), None)
        assert value in made.levels


def test_a_misspelled_data_type_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean uint or int"):
        catalog.find(FORMATS, "unit", "data type")
