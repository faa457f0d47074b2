"""Depthwise convolutions of codes equal int64 numpy bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.quant.levels import of_levels
from kbitc.targets.cpu.rules.integer import CodeDepthwise
from kbitc.targets.kernels.byte_dot import byte_dot
from kbitc.targets.kernels.idepthwise import MOST_TAPS, exact, pack_taps, places
from kbitc.targets.lower.contraction import ConvAttributes
from kbitc.targets.target import Target, parse_target
from tests.support.integer_products import check, conv, levels, reset
from tests.support.kernels import compile_cases

RULE = CodeDepthwise()


@pytest.fixture(params=["x86:avx512vnni", "x86:avx2", pytest.param("arm-neon:dotprod", marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest) -> Target:
    return parse_target(request.param)


def test_channels_and_geometry(target: Target) -> None:
    """Exact registers test the border, the others read a copy with one; sums without an epilogue keep their order."""
    three, uneven = ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1)), ConvAttributes((5, 2), (1, 2), (1, 0, 2, 1), (1, 2))
    subjects = [
        conv("c96", levels(8, "bytes", (96, 9, 1)), (2, 9, 8), _grouped(three, 96)),
        conv("c7", levels(4, "affine", (7, 10, 1)), (1, 9, 8), _grouped(uneven, 7)),
        conv("c48", levels(8, "bytes", (48, 10, 1)), (1, 9, 9), _grouped(uneven, 48)),
        conv("c33", levels(8, "bytes", (33, 9, 1)), (1, 5, 5), _grouped(three, 33), requantized=False),
        conv("c16", levels(8, "bytes", (16, 3, 1)), (1, 1, 9), _grouped(ConvAttributes((1, 3)), 16), shift=31),
        conv("tiny", levels(8, "bytes", (16, 9, 1)), (1, 1, 1), _grouped(three, 16), accumulators_out=True),
    ]
    check([reset(RULE, subject) for subject in subjects], target)


def _grouped(conv: ConvAttributes, group: int) -> ConvAttributes:
    return ConvAttributes(conv.kernel, conv.strides, conv.pads, conv.dilations, group)


@pytest.mark.parametrize("values", ["largest", "smallest", "outlier"])
def test_extreme_values(values: str) -> None:
    """Levels of 64 and 16 fill the sums of 16 bits of one result and of four."""
    geometry = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1), group=32)
    for name in ("x86:avx512vnni", "x86:avx2"):
        subjects = []
        for low, high in ((-128, 127), (-64, 64), (-16, 16)):
            weight = of_levels(np.where(np.arange(32)[:, None, None] % 2, high, low) * np.ones((32, 9, 1), np.int8))
            subjects += [conv(f"z{zero}_{high}", weight, (1, 3, 4), geometry, zero=zero) for zero in (0, 255)]
        check([reset(RULE, subject, values) for subject in subjects], parse_target(name))


@pytest.mark.parametrize("dot", ["vpdpbusd", "vpmaddwd", "sdot"])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 63, 64, 65, 144])
def test_every_channel_has_one_place_and_its_taps(dot: str, channels: int) -> None:
    found = np.concatenate([run for run, _ in places(channels, byte_dot(dot))])
    assert sorted(found[found >= 0]) == list(range(channels))
    assert exact(channels, byte_dot(dot)) == (found.min() >= 0)
    weight = np.random.default_rng(0).integers(-128, 128, (channels, 9)).astype(np.int8)
    packed = pack_taps(weight, byte_dot(dot)).view(np.int8)
    assert packed.size == found.size * 12 and packed.astype(int).sum() == weight.astype(int).sum()


def test_the_bytes_are_interleaved_and_ordered_by_shuffles() -> None:
    weight = levels(8, "bytes", (64, 9, 1))
    case = reset(RULE, conv("c", weight, (1, 9, 9), ConvAttributes((3, 3), group=64)))
    text = compile_cases([case], parse_target("x86:avx512vnni")).assembly()
    assert "vpunpcklbw" in text and "vpunpckhwd" in text and "vpdpbusd" in text and "vpinsrb" not in text


def test_the_rule_declines_with_a_reason() -> None:
    target = parse_target("x86:avx2")
    dense = conv("c", levels(8, "bytes", (8, 9, 2)), (1, 5, 5), ConvAttributes((3, 3), group=4))
    assert "more than one" in (RULE.match(dense, target) or "")
    taps = MOST_TAPS + 1
    long = conv("l", levels(8, "bytes", (4, taps, 1)), (1, 1, 99), ConvAttributes((1, taps), group=4))
    assert "taps" in (RULE.match(long, target) or "")
