"""The ways of making codes of sums agree with the one rounding rule at every sum where the code changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kbitc.graph.integer_functions import code_factor
from kbitc.quant.levels import of_levels
from kbitc.targets.cpu.rules.integer import CodeProduct
from kbitc.targets.kernels.byte_dot import byte_dot
from kbitc.targets.kernels.requantize import EXACT_FLOAT, MOST_SUM, Way, epilogue_of
from kbitc.targets.lower.contraction import Contraction, Requantization
from kbitc.targets.target import Target, parse_target
from tests.support.integer_products import check, reset
from tests.support.kernels import Case, compile_cases

TARGETS = ("x86:avx512vnni", "x86:avx2", "arm-neon:dotprod")
ZERO = 117
CHANNELS = 4096


@pytest.fixture(params=[*TARGETS[:2], pytest.param(TARGETS[2], marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest) -> Target:
    return parse_target(request.param)


def sums(name: str, biases: list[int], numbers: Requantization) -> Case:
    """A product whose levels are all 0, so that its sums are the biases, one a channel."""
    weight = of_levels(np.zeros((len(biases), 1, 4), np.int8))
    bias = np.array(biases, np.int32)
    what = Contraction(name, "matmul", weight, "uint8", (2, 4), (2, len(biases)), bias=bias, requantize=numbers)
    return reset(CodeProduct(), what)


def around_codes(name: str, low: int = 0, high: int = 255) -> Case:
    """Channels with any factor in [2^-16, 2^8) and the first sum of some code, or the last before it."""
    random = np.random.default_rng(0)
    pairs = [code_factor(float(ratio)) for ratio in 2.0 ** random.uniform(-16, 8, CHANNELS)]
    biases = []
    for multiplier, shift in pairs:
        code, before = int(random.integers(-1, 258)), int(random.integers(0, 2))
        first = -((-((2 * (code - ZERO) - 1) << (shift - 1))) // multiplier)  # rounded up
        biases.append(first - before)
    multiplier, shift = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    return sums(name, biases, Requantization(multiplier, shift, ZERO, low, high))


def large(name: str) -> Case:
    """Sums from 2^24 on, up to the largest, of both signs, with factors up to one half."""
    magnitudes = [EXACT_FLOAT + step for step in (-1, 0, 1, 2, 3)] + [1 << 30, MOST_SUM - 1]
    biases, pairs = [], []
    for magnitude in magnitudes:
        for exponent in range(-16, -1):
            biases += [magnitude, -magnitude]
            pairs += 2 * [code_factor(2.0**exponent * 1.3)]
    for shift in (30, 40, 46):
        middle = 1 << (shift - 21)  # times the multiplier it is in the middle of two integers
        biases += [middle, -middle, 3 * middle, -3 * middle]
        pairs += 4 * [(1 << 30 | 1 << 20, shift)]
    biases += [0, MOST_SUM - 1, 1 - MOST_SUM]
    pairs += [(0, 1)] * 3
    multiplier, shift = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    return sums(name, biases, Requantization(multiplier, shift, ZERO, 0, 255))


def test_codes_change_at_the_same_sums(target: Target) -> None:
    check([around_codes("whole"), around_codes("limited", 40, 90), large("large")], target)


def test_one_multiply_add_makes_the_codes() -> None:
    assembly = compile_cases([around_codes("whole")], parse_target("x86:avx512vnni")).assembly()
    assert "vfmadd" in assembly and "vpmuldq" not in assembly and "vpmaxs" not in assembly


@pytest.mark.parametrize(
    ("multiplier", "shift", "most", "way"),
    [
        (1 << 30 | 1 << 7, 40, MOST_SUM, Way.SINGLE),
        (0, 1, MOST_SUM, Way.SINGLE),
        (1 << 30 | 1 << 7, 47, MOST_SUM, Way.HIGH),  # 2^24 may be a code that is no limit
        (1 << 30 | 1 << 7, 47, EXACT_FLOAT - 1, Way.SINGLE),
        (1 << 30 | 1 << 20, 40, MOST_SUM, Way.SINGLE),
        (1 << 30 | 1 << 21, 40, 1 << 20, Way.HIGH),  # sums of 2^18 lie in the middle of two integers, at 2^8 codes
        (1 << 30 | 1 << 7, 1, MOST_SUM, Way.SINGLE),
        (1 << 30 | 1, 40, 1 << 20, Way.HIGH),  # no float32 number
        (1 << 30 | 1, 31, 1 << 20, Way.WIDE),
        (1 << 30 | 1 << 7, 55, EXACT_FLOAT, Way.WIDE),
    ],
)
def test_the_way_is_exact(multiplier: int, shift: int, most: int, way: Way) -> None:
    numbers = Requantization(np.array([multiplier], np.int32), np.array([shift], np.int32), 3, 0, 255)
    assert epilogue_of(numbers, byte_dot("vpdpbusd"), most).way is way
    assert epilogue_of(numbers, byte_dot(""), most).way is not Way.SINGLE  # no such instruction


def test_only_sums_that_turn_the_order_of_bits_are_guarded() -> None:
    dot, factor = byte_dot("vpmaddwd"), code_factor(0.3)
    numbers = Requantization(*(np.array([part], np.int32) for part in factor), 3, 0, 255)  # type: ignore[call-arg]
    limit = math.ceil(1.5 * 2**23 / 0.3)
    assert not epilogue_of(numbers, dot, limit - 1000).guarded and epilogue_of(numbers, dot, limit).guarded
