"""Round to nearest: half-step bound, idempotence, invariances, and what zero and extreme blocks become."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.passes.solvers.rtn import solve
from kbitc.quant.scheme import FORMATS, QuantScheme
from kbitc.quant.tensor import spread


def _schemes() -> list[str]:
    """Every data type at every width, in blocks, per channel and per tensor, and with every kind of coded scales."""
    found = []
    for name in catalog.names(FORMATS):
        for bits in range(1, 9):
            kinds = ("b16:f32", "b32:f32", "c:f32", "t:f32", "b16/i4", "b16/i4:f32", "b32:dq8", "c:dq8:f32")
            for rest in (*kinds, "b32:min", "b16:min:f32", "c:min", "t:min:f32"):
                try:
                    found.append(str(QuantScheme.parse(f"{name}-{bits}:{rest}")))
                except UsageError:
                    continue
    return [text for text in found if not text.startswith("table")]


SCHEMES = _schemes()
Weight = npt.NDArray[np.float32]


def _weight(shape: tuple[int, int, int] = (5, 2, 40)) -> Weight:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("text", SCHEMES)
def test_error_is_at_most_half_the_widest_step(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    tensor = solve(weight, scheme)
    if scheme.bits == 1 and not scheme.zero_point and not scheme.offset:
        return
    levels, scales = np.array(tensor.format.levels, float), spread(tensor.scales, tensor.shape, scheme)
    # An asymmetric zero point is itself rounded, by at most half a step.
    bound = (1.0 if scheme.zero_point else 0.5) * np.diff(levels).max() * scales
    if tensor.zero_points is not None:
        levels = levels - spread(tensor.zero_points, tensor.shape, scheme)[..., None] - levels[0]
    offsets = np.zeros(1, np.float32)
    if tensor.offsets is not None:
        levels, offsets = levels - levels[0], spread(tensor.offsets, tensor.shape, scheme)
    # A scale that is rounded down, or a learned table that stops short of the largest weight, clips.
    beyond = np.maximum(weight - scales * levels[..., -1] - offsets, scales * levels[..., 0] + offsets - weight)
    assert (np.abs(tensor.dequantize() - weight) <= np.maximum(bound, beyond) * (1 + 1e-5)).all()


@pytest.mark.parametrize("text", SCHEMES)
def test_what_the_codes_stand_for_has_the_same_codes(text: str) -> None:
    tensor = solve(_weight(), QuantScheme.parse(text))
    values = tensor.dequantize()
    if tensor.offsets is not None:
        values = values - spread(tensor.offsets, tensor.shape, tensor.scheme)
    integers = (values / spread(tensor.scales, tensor.shape, tensor.scheme)).astype(np.float32)
    if tensor.offsets is not None:
        integers += tensor.format.grid[0]
    if tensor.zero_points is not None:
        integers += tensor.format.grid[spread(tensor.zero_points, tensor.shape, tensor.scheme)]
    again = tensor.format.encode(integers)
    np.testing.assert_array_equal(tensor.format.decode(again), tensor.format.decode(tensor.codes))


@pytest.mark.parametrize("text", SCHEMES)
def test_a_power_of_two_factor_goes_into_the_scales(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    plain, scaled = solve(weight, scheme), solve(weight * np.float32(8), scheme)
    np.testing.assert_array_equal(plain.codes, scaled.codes)
    np.testing.assert_array_equal(plain.scales * np.float32(8), scaled.scales)


@pytest.mark.parametrize("text", [text for text in SCHEMES if ":t" not in text and "dq8" not in text])
def test_channels_do_not_see_each_other(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(solve(weight, scheme).dequantize()[order], solve(weight[order], scheme).dequantize())


@pytest.mark.parametrize("text", sorted({text.replace(":f32", "") for text in SCHEMES}))
def test_all_zero_blocks_stay_zero(text: str) -> None:
    weight = _weight()
    weight[2] = 0
    scheme = QuantScheme.parse(text)
    if ":t" in text:
        weight[:] = 0
    found = solve(weight, scheme).dequantize()
    assert not found[2].any()


@pytest.mark.parametrize("text", ["int4:b32", "uint4:b32", "nf4:b32", "int8:c", "int2:t", "int1:b16"])
def test_f16_scales_are_f16_values(text: str) -> None:
    tensor = solve(_weight(), QuantScheme.parse(text))
    np.testing.assert_array_equal(tensor.scales, tensor.scales.astype(np.float16).astype(np.float32))
    assert (tensor.scales > 0).all()


# Bits per weight of the rate-distortion bound is 6.02 dB a bit; round to nearest with absmax blocks of 32 on a
# Gaussian loses the factor absmax / sigma: the step is 2 * absmax / 2^k, the noise step^2 / 12, and the expected
# absmax of 32 normals is 2.07 sigma (at most 4.2 with probability 0.999), so SQNR >= 6.02 k + 4.77 - 20 log10(4.2).
@pytest.mark.parametrize("bits", range(3, 9))
def test_sqnr_floor_on_gaussian_weights(bits: int) -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 512)).astype(np.float32)
    error = solve(weight, QuantScheme.parse(f"int{bits}:b32")).dequantize() - weight
    sqnr = 10 * np.log10((weight**2).sum() / (error**2).sum())
    assert sqnr >= 6.02 * bits + 4.77 - 20 * np.log10(4.2)


def test_tails_are_blocks_of_their_own() -> None:
    weight = np.ones((1, 1, 33), np.float32)
    weight[0, 0, 32] = 1000
    tensor = solve(weight, QuantScheme.parse("int4:b32:f32"))
    assert tensor.scales.shape == (1, 1, 2)
    np.testing.assert_allclose(tensor.dequantize()[0, 0, :32], 1.0, rtol=1e-6)


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    weight = _weight((4, 1, 64))
    assert solve(weight, QuantScheme.parse("int4:b32")).bits_per_weight() == 4.5
    assert solve(weight, QuantScheme.parse("uint3:b32")).bits_per_weight() == 3 + (16 + 3) / 32
    assert solve(weight, QuantScheme.parse("int8:t")).bits_per_weight() == 8 + 16 / 256
    assert solve(weight, QuantScheme.parse("uint3:b32:min")).bits_per_weight() == 3 + (16 + 16) / 32
    assert solve(weight, QuantScheme.parse("uint4:c:min:f32")).bits_per_weight() == 4 + (32 + 32) / 64
    assert solve(weight, QuantScheme.parse("int4:b32/i4")).bits_per_weight() == 4 + 4 / 32 + 16 / 64
    assert solve(weight, QuantScheme.parse("int4:b32:dq8")).bits_per_weight() == 4 + 8 / 32 + 32 / 256
    assert solve(weight, QuantScheme.parse("kmeans3:b64")).bits_per_weight() == 3 + 16 / 64 + 8 * 8 / 256


def _sqnr(text: str, weight: Weight) -> float:
    error = solve(weight, QuantScheme.parse(text)).dequantize() - weight
    return float(10 * np.log10((weight**2).sum() / (error**2).sum()))


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_normal_float_beats_integers_and_a_fitted_table_beats_both_on_normal_weights(bits: int, block: int) -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 512)).astype(np.float32)
    found = {name: _sqnr(f"{name}{bits}:b{block}", weight) for name in ("int", "nf", "kmeans")}
    # Normal float makes levels equally likely, which is not the least squared error: from 5 bits on integers pass it.
    assert found["int"] < found["nf"] < found["kmeans"] if bits < 5 else max(found, key=found.__getitem__) == "kmeans"


def test_small_floats_beat_integers_on_normal_weights_in_large_blocks() -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 512)).astype(np.float32)
    assert _sqnr("fp4-e2m1:b256", weight) > _sqnr("int4:b256", weight)


@pytest.mark.parametrize("text", ["int2:b32", "int3:b32", "int4:b32", "int4:b64", "uint4:b32", "fp4:b32"])
def test_integer_block_scales_cost_at_most_half_a_decibel(text: str) -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 4096)).astype(np.float32)
    assert _sqnr(f"{text}/i4", weight) >= _sqnr(text, weight) - 0.5


@pytest.mark.parametrize("text", ["int4:b64", "nf4:b64", "uint3:b32", "int8:c"])
def test_doubly_quantized_scales_cost_at_most_a_tenth_of_a_decibel(text: str) -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 4096)).astype(np.float32)
    assert _sqnr(f"{text}:dq8", weight) >= _sqnr(text, weight) - 0.1


def test_with_integer_block_scales_a_weight_is_an_int8_times_the_step_of_its_channel() -> None:
    weight = np.random.default_rng(3).normal(size=(6, 2, 100)).astype(np.float32)
    for text in ("int4:b32/i4", "int3:b16/i4:f32", "uint4:b32/i4", "fp4:b32/i4", "uint3:b64/i4"):
        tensor = solve(weight, QuantScheme.parse(text))
        assert tensor.scale_steps is not None and tensor.scale_steps.shape == (6,)
        integers = tensor.integer_levels()
        assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() <= 127
        np.testing.assert_array_equal(integers * tensor.scale_steps[:, None, None], tensor.dequantize())


def test_coded_scales_are_exact_in_their_type_over_a_wide_range() -> None:
    rng = np.random.default_rng(2)
    weight = (rng.normal(size=(40, 1, 512)) * 2.0 ** rng.integers(-10, 6, (40, 1, 1))).astype(np.float32)
    for text in ("int4:b32/i4", "int4:b32:dq8", "nf4:b16:dq8"):
        tensor = solve(weight, QuantScheme.parse(text))
        np.testing.assert_array_equal(tensor.scales, tensor.scales.astype(np.float16).astype(np.float32))
        assert (tensor.scale_codes() >= 1).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", [32, 64, 75])
def test_a_weight_on_a_grid_with_offsets_comes_back_exactly(bits: int, channels: int) -> None:
    """Blocks of f16 steps and offsets as in Q4_1 of ggml, the lowest and the highest level in each of them."""
    rng = np.random.default_rng(bits)
    blocks = -(-channels // 32)
    step, least = (rng.normal(size=(6, blocks, 1)).astype(np.float16).astype(np.float32) for _ in range(2))
    codes = rng.integers(0, 2**bits, (6, blocks, 32))
    codes[:, :, 1], codes[:, :, 7] = 0, 2**bits - 1
    weight = (codes.astype(np.float32) * np.abs(step) + least).reshape(6, 1, -1)[:, :, :channels]
    tensor = solve(weight, QuantScheme.parse(f"uint{bits}:b32:min"))
    # The range is the difference of two rounded sums; f16 forgets that where the offset is not 2^10 times the range.
    np.testing.assert_array_equal(tensor.codes, codes.reshape(6, 1, -1)[:, :, :channels])
    np.testing.assert_array_equal(tensor.dequantize(), weight)


def test_offsets_are_f16_values_and_the_blocks_smallest_weight() -> None:
    weight = np.arange(1, 81, dtype=np.float32).reshape(1, 2, 40) / 7
    tensor = solve(weight, QuantScheme.parse("uint4:b32:min"))
    assert tensor.offsets is not None and tensor.offsets.shape == tensor.scales.shape == (1, 2, 2)
    np.testing.assert_array_equal(tensor.offsets, tensor.offsets.astype(np.float16).astype(np.float32))
    least = weight[0][:, [0, 32]]
    assert (np.abs(tensor.offsets[0] - least) <= 2.0**-11 * least).all()


def test_a_block_of_one_number_is_its_offset() -> None:
    weight = np.full((2, 1, 40), -3.25, np.float32)
    weight[1] = 0
    for text in ("uint4:b16:min", "uint1:c:min", "uint8:t:min:f32"):
        given = weight if ":t" not in text else weight[:1]
        np.testing.assert_array_equal(solve(given, QuantScheme.parse(text)).dequantize(), given)


def test_one_bit_normal_float_is_refused() -> None:
    with pytest.raises(UsageError, match="2 to 7 bits"):
        QuantScheme.parse("nf1:b32")
