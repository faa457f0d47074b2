"""Float depthwise convolutions, against float64 within the bound of a sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import tirx

from kbitc.targets.cpu.rules.float import FloatDepthwise
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, PostFunction
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support.float_kernels import Compiled, check_sum, convolution, uniform
from tests.support.kernels import gather_rows

TARGETS = ("x86:avx2", "x86:avx512vnni")
SIX = PostFunction(0.0, 6.0)
CASES = [
    # image, channels, geometry without its group
    ((1, 9, 12), 16, ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))),
    ((2, 7, 13), 20, ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))),
    ((1, 6, 11), 5, ConvAttributes((5, 5), (1, 2), (2, 2, 2, 2))),
    ((1, 8, 10), 40, ConvAttributes((3, 2), (1, 1), (0, 0, 2, 1), (2, 3))),
    ((1, 1, 40), 33, ConvAttributes((1, 7), (1, 1), (0, 3, 0, 3))),
    ((1, 12, 12), 3, ConvAttributes((7, 7), (1, 1), (3, 3, 3, 3))),
    ((1, 2, 2), 17, ConvAttributes((5, 5), (1, 1), (2, 2, 2, 2))),
]


def target_here(name: str) -> Target:
    target = parse_target(name)
    reason = host_runs(target)
    if reason is not None:
        pytest.skip(reason)
    return target


def depthwise(rows: Any, weight: Any) -> Any:
    """Gathered pixels [M, T, N] by w [N, T, 1]."""
    return np.einsum("mtn,nt->mn", rows, weight[:, :, 0])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("image", "channels", "geometry"), CASES)
def test_against_float64(name: str, image: tuple[int, int, int], channels: int, geometry: ConvAttributes) -> None:
    taps = geometry.kernel[0] * geometry.kernel[1]
    geometry = ConvAttributes(geometry.kernel, geometry.strides, geometry.pads, geometry.dilations, channels)
    weight, bias, x = uniform(1, channels, taps, 1), uniform(2, channels), uniform(3, *image, channels)
    what = convolution(weight, image, geometry, bias=bias, post=SIX)
    got = Compiled(FloatDepthwise(), what, target_here(name))(x)
    assert got.shape == what.out_shape
    rows = gather_rows(x, geometry)
    check_sum(got.reshape(-1, channels), depthwise, rows, weight, taps, bias=bias, post=SIX)


def test_symbolic_image() -> None:
    geometry = ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1), group=18)
    weight = uniform(1, 18, 9, 1)
    b, h, w = (tirx.Var(name, "int64") for name in "bhw")
    out = (b, (h + 1) // 2, (w + 1) // 2, 18)
    run = Compiled(
        FloatDepthwise(),
        Contraction("node", "conv", weight, "float32", (b, h, w, 18), out, conv=geometry),
        target_here("x86:avx2"),
    )
    for image in ((1, 8, 23), (2, 1, 2), (1, 1, 1), (1, 5, 9)):
        x = uniform(3, *image, 18)
        check_sum(run(x).reshape(-1, 18), depthwise, gather_rows(x, geometry), weight, 9)


def test_a_nan_outside_the_window_is_not_read_into_it() -> None:
    """Lanes behind the last channel and pixels outside the image contribute nothing."""
    geometry = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1), group=3)
    weight, x = uniform(1, 3, 9, 1), uniform(3, 1, 8, 9, 3)
    x[0, 4, 4, 1] = np.nan
    what = convolution(weight, (1, 8, 9), geometry)
    got = Compiled(FloatDepthwise(), what, target_here("x86:avx512vnni"))(x)
    wanted = np.zeros((1, 8, 9, 3), bool)
    wanted[0, 3:6, 3:6, 1] = True
    np.testing.assert_array_equal(np.isnan(got), wanted)


@pytest.mark.parametrize(("name", "pattern"), [("x86:avx512vnni", "zmm"), ("arm-neon:dotprod", ".4s")])
def test_channels_are_vectors(name: str, pattern: str) -> None:
    geometry = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1), group=64)
    what = convolution(uniform(1, 64, 9, 1), (1, 20, 20), geometry)
    text = Compiled(FloatDepthwise(), what, parse_target(name)).assembly()
    fused = [line for line in text.splitlines() if ("vfmadd" in line or "fmla" in line) and pattern in line]
    assert len(fused) >= 9 * 4


def test_declines_other_groupings() -> None:
    target = parse_target("x86:avx2")
    two = convolution(uniform(1, 8, 9, 1), (1, 5, 5), ConvAttributes((3, 3), group=4))
    assert "more than one" in str(FloatDepthwise().match(two, target))
    assert FloatDepthwise().match(Contraction("n", "batch_matmul", None, "float32", (), ()), target) is not None
