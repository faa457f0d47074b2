"""Round to nearest: half-step bound, idempotence, invariances, and what zero and extreme blocks become."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kbitc.errors import UsageError
from kbitc.passes.solvers.rtn import solve
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import spread

SCHEMES = [
    f"{name}{bits}:{granularity}:f32"
    for name in ("int", "uint", "nf")
    for bits in range(1, 9)
    for granularity in ("b16", "b32", "c", "t")
    if not (name == "nf" and bits in (1, 8))
]
Weight = npt.NDArray[np.float32]


def _weight(shape: tuple[int, int, int] = (5, 2, 40)) -> Weight:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("text", SCHEMES)
def test_error_is_at_most_half_the_widest_step(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    tensor = solve(weight, scheme)
    if scheme.bits == 1 and not scheme.zero_point:
        return
    widest = max(np.diff(np.array(tensor.format.levels, float)))
    # An asymmetric zero point is itself rounded, by at most half a step.
    slack = 1.0 if scheme.zero_point else 0.5
    bound = slack * widest * spread(tensor.scales, tensor.shape, scheme) * (1 + 1e-5)
    assert (np.abs(tensor.dequantize() - weight) <= bound).all()


@pytest.mark.parametrize("text", SCHEMES)
def test_what_the_codes_stand_for_has_the_same_codes(text: str) -> None:
    tensor = solve(_weight(), QuantScheme.parse(text))
    integers = (tensor.dequantize() / spread(tensor.scales, tensor.shape, tensor.scheme)).astype(np.float32)
    if tensor.zero_points is not None:
        integers += tensor.format.grid[spread(tensor.zero_points, tensor.shape, tensor.scheme)]
    np.testing.assert_array_equal(tensor.format.encode(integers), tensor.codes)


@pytest.mark.parametrize("text", SCHEMES)
def test_a_power_of_two_factor_goes_into_the_scales(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    plain, scaled = solve(weight, scheme), solve(weight * np.float32(8), scheme)
    np.testing.assert_array_equal(plain.codes, scaled.codes)
    np.testing.assert_array_equal(plain.scales * np.float32(8), scaled.scales)


@pytest.mark.parametrize("text", [text for text in SCHEMES if ":t" not in text])
def test_channels_do_not_see_each_other(text: str) -> None:
    scheme, weight = QuantScheme.parse(text), _weight()
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(solve(weight, scheme).dequantize()[order], solve(weight[order], scheme).dequantize())


@pytest.mark.parametrize("text", [text.replace(":f32", "") for text in SCHEMES])
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


def test_normal_float_beats_integers_on_normal_weights() -> None:
    weight = np.random.default_rng(3).normal(size=(64, 1, 512)).astype(np.float32)
    errors = {
        text: float(((solve(weight, QuantScheme.parse(text)).dequantize() - weight) ** 2).sum())
        for text in ("nf4:b64", "int4:b64")
    }
    assert errors["nf4:b64"] < errors["int4:b64"]


def test_one_bit_normal_float_is_refused() -> None:
    with pytest.raises(UsageError, match="2 to 7 bits"):
        QuantScheme.parse("nf1:b32")
